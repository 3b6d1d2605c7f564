//! A measured figure and its verdict.

use serde::Serialize;

/// A figure. Scripts outside the project rely on the words; `note` is for people.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    /// What was measured.
    pub(crate) name: String,
    /// The result.
    pub(crate) value: f64,
    /// Its unit.
    pub(crate) unit: &'static str,
    /// The same of the peer (another tool, or the same guest undisturbed), in the same run.
    pub(crate) peer: Option<f64>,
    /// What is compared with `aim` and `accept`: the value over the peer's, or the value itself where the goal is absolute.
    pub(crate) ratio: f64,
    /// The goal.
    pub(crate) aim: f64,
    /// What must be reached. Above the aim when less is better, below it when more is.
    pub(crate) accept: f64,
    /// Samples, spread, circumstances.
    pub(crate) note: String,
}

/// How a figure did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Reached,
    Accepted,
    Missed,
}

impl Figure {
    pub(crate) fn verdict(&self) -> Verdict {
        let is_at_least_as_good = |goal: f64| {
            if self.aim < self.accept { self.ratio <= goal } else { self.ratio >= goal }
        };
        if is_at_least_as_good(self.aim) {
            Verdict::Reached
        } else if is_at_least_as_good(self.accept) {
            Verdict::Accepted
        } else {
            Verdict::Missed
        }
    }

    /// The row of the table.
    pub(crate) fn row(&self) -> Vec<String> {
        let verdict = match self.verdict() {
            Verdict::Reached => "aim",
            Verdict::Accepted => "accepted",
            Verdict::Missed => "MISSED",
        };
        vec![
            self.name.clone(),
            format!("{} {}", short(self.value), self.unit),
            self.peer.map_or_else(|| "-".to_owned(), short),
            short(self.ratio),
            short(self.aim),
            short(self.accept),
            verdict.to_owned(),
            self.note.clone(),
        ]
    }
}

/// Three digits that count.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The middle one; of an even number, the lower of the two. `None` of nothing.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    percentile(values, 0.5)
}

/// The smallest value that at least this share of all is not above. `None` of nothing.
pub(crate) fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// "a to b" for a note.
pub(crate) fn spread(values: &[f64]) -> String {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{} to {}", short(low), short(high))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(ratio: f64, aim: f64, accept: f64) -> Figure {
        let note = String::new();
        Figure { name: "x".to_owned(), value: ratio, unit: "s", peer: None, ratio, aim, accept, note }
    }

    #[test]
    fn the_verdict_knows_whether_more_or_less_is_better() {
        assert_eq!(figure(0.9, 0.8, 0.5).verdict(), Verdict::Reached);
        assert_eq!(figure(0.6, 0.8, 0.5).verdict(), Verdict::Accepted);
        assert_eq!(figure(0.4, 0.8, 0.5).verdict(), Verdict::Missed);
        assert_eq!(figure(1.04, 1.05, 1.3).verdict(), Verdict::Reached);
        assert_eq!(figure(1.2, 1.05, 1.3).verdict(), Verdict::Accepted);
        assert_eq!(figure(1.4, 1.05, 1.3).verdict(), Verdict::Missed);
        assert_eq!(figure(f64::NAN, 1.05, 1.3).verdict(), Verdict::Missed);
    }

    /// Scripts read these words: a change of this test is a change for them.
    #[test]
    fn the_words_of_a_figure_are_a_contract() {
        let expected = serde_json::json!({
            "name": "x", "value": 0.5, "unit": "s", "peer": null, "ratio": 0.5, "aim": 0.8, "accept": 0.25,
            "note": "",
        });
        assert_eq!(serde_json::to_value(figure(0.5, 0.8, 0.25)).unwrap(), expected);
    }

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 0.99), Some(198.0));
        assert_eq!(median(&values), Some(100.0));
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[]), None);
    }
}
