//! What becomes of what is printed when nobody takes it.

use std::{
    fs::OpenOptions,
    process::{Command, Stdio},
};

/// A command that prints a few hundred lines and needs nothing.
fn print(into: Stdio) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
    let output = command.args(["completion", "bash"]).stdout(into).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn who_reads_no_further_has_had_enough() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(print(writer.into()), (Some(0), String::new()));
}

#[test]
fn what_cannot_be_written_is_told() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let (code, told) = print(full.into());
    assert_eq!(code, Some(1));
    assert!(told.contains("the output cannot be written"), "{told}");
}
