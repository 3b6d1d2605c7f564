//! The only place that prints: data to standard output, everything else to standard error.

use std::io::{self, ErrorKind, Write as _};

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::exit::Exit;

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

/// Writes to standard output. Whoever reads it may have had enough (`mainstay event list | head`): that is no failure, and
/// what the command does goes on. Data that cannot be written, to a full disk for example, is one.
fn print(bytes: &[u8]) {
    match io::stdout().lock().write_all(bytes) {
        Err(failure) if failure.kind() != ErrorKind::BrokenPipe => {
            error(&format!("the output cannot be written: {failure}"));
            std::process::exit(Exit::Failed as i32);
        }
        _ => {}
    }
}

/// Writes to standard error. Where that fails, there is nobody to tell.
fn tell(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Prints data.
pub(crate) fn line(text: &str) {
    print(format!("{}\n", harmless(text)).as_bytes());
}

/// Prints a resource as it came.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    print(format!("{}\n", serde_json::to_string_pretty(value)?).as_bytes());
    Ok(())
}

/// Prints a completion script.
pub(crate) fn completion(shell: clap_complete::Shell, command: &mut clap::Command) {
    let mut script = Vec::new();
    clap_complete::generate(shell, command, "mainstay", &mut script);
    print(&script);
}

/// Prints a piece of a download.
pub(crate) fn piece(bytes: &[u8]) -> io::Result<()> {
    io::stdout().lock().write_all(bytes)
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
    print(format!("{table}\n").as_bytes());
}

/// Tells what goes on.
pub(crate) fn note(text: &str) {
    tell(&harmless(text));
}

/// Tells what went wrong.
pub(crate) fn error(text: &str) {
    tell(&format!("mainstay: {}", harmless(text)));
}

/// Tells what to do next.
pub(crate) fn hint(text: &str) {
    tell(&format!("  → {}", harmless(text)));
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
