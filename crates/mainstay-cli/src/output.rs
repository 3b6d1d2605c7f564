//! The only place that prints: data to standard output, everything else to standard error.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the module that prints")]

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// Text that does to a terminal what text does, and no more. Much of what is shown comes from elsewhere: names of VMs, what
/// guests and hosts say. Line ends stay; every other control character is shown as its escape, and so is what turns the
/// direction of writing, with which one name can look like another.
fn harmless(text: &str) -> std::borrow::Cow<'_, str> {
    let is_harmful = |c: char| {
        c.is_control() && !matches!(c, '\n' | '\t')
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(is_harmful) {
        return text.into();
    }
    let shown =
        text.chars().map(|c| if is_harmful(c) { c.escape_default().to_string() } else { c.to_string() });
    shown.collect::<String>().into()
}

/// Prints data.
pub(crate) fn line(text: &str) {
    println!("{}", harmless(text));
}

/// Prints a resource as it came.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Prints a piece of a download.
pub(crate) fn piece(bytes: &[u8]) -> std::io::Result<()> {
    std::io::Write::write_all(&mut std::io::stdout().lock(), bytes)
}

/// Prints rows under headings.
pub(crate) fn table(headings: &[&str], rows: Vec<Vec<String>>) {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(headings.to_vec());
    for row in rows {
        table.add_row(row.iter().map(|cell| harmless(cell)));
    }
    println!("{table}");
}

/// Tells what goes on.
pub(crate) fn note(text: &str) {
    eprintln!("{}", harmless(text));
}

/// Tells what went wrong.
pub(crate) fn error(text: &str) {
    eprintln!("mainstay: {}", harmless(text));
}

/// Tells what to do next.
pub(crate) fn hint(text: &str) {
    eprintln!("  → {}", harmless(text));
}

/// Progress of something long, on standard error.
pub(crate) fn spinner() -> anyhow::Result<ProgressBar> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}")?);
    Ok(bar)
}

/// Bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_does_nothing_to_a_terminal() {
        assert_eq!(harmless("web-1 ä ✓\n\tb"), "web-1 ä ✓\n\tb");
        assert_eq!(harmless("a\u{1b}]0;title\u{7}b\r\u{9b}2J"), "a\\u{1b}]0;title\\u{7}b\\r\\u{9b}2J");
        assert_eq!(harmless("web\u{202e}1-bd"), "web\\u{202e}1-bd");
    }
}
