//! The only place that prints: the table to standard output, everything else to standard error.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the module that prints")]

use comfy_table::{ContentArrangement, Table, presets};

use crate::figure::Figure;

/// Tells what goes on.
pub(crate) fn note(text: &str) {
    eprintln!("{text}");
}

/// Prints the figures.
pub(crate) fn table(figures: &[Figure]) {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["FIGURE", "VALUE", "PEER", "RATIO", "AIM", "ACCEPT", "VERDICT", "NOTE"]);
    for figure in figures {
        table.add_row(figure.row());
    }
    println!("{table}");
}
