//! What the kernel's command line says about the ledger: words of the form `ledger.NAME=VALUE`.

/// How the ledger writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Records per second.
    pub(crate) rate: u64,
    /// Random writes besides the ledger, in KiB per second.
    pub(crate) churn_kib: u64,
    /// Size of a new ring in MiB; a quarter of the smaller disk when not given.
    pub(crate) ring_mib: Option<u64>,
}

impl Settings {
    /// Reads a command line; words that make no sense are ignored, as the kernel does.
    pub(crate) fn parse(command_line: &str) -> Self {
        let value = |name: &str| {
            command_line
                .split_whitespace()
                .filter_map(|word| word.strip_prefix("ledger."))
                .filter_map(|word| word.split_once('='))
                .filter(|(key, _)| *key == name)
                .find_map(|(_, value)| value.parse::<u64>().ok())
        };
        Self {
            // More than a thousand fsyncs per second no test disk can do; the bound keeps the pause above zero.
            rate: value("rate").unwrap_or(20).clamp(1, 1000),
            churn_kib: value("churn_kib").unwrap_or(0),
            ring_mib: value("ring_mib").filter(|mib| *mib > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_words_and_ignores_others() {
        let settings =
            Settings::parse("console=ttyS0 ledger.rate=50 ledger.churn_kib=x ledger.churn_kib=8 quiet");
        assert_eq!(settings, Settings { rate: 50, churn_kib: 8, ring_mib: None });
        assert_eq!(Settings::parse("").rate, 20);
        assert_eq!(Settings::parse("ledger.rate=0").rate, 1);
    }
}
