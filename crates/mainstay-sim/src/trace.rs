//! What happened in a world, as a digest that two runs can be compared by.

use std::{
    cell::RefCell,
    fmt::{self, Write as _},
    fs::File,
    io::Write as _,
};

use crate::chance;

thread_local! {
    static TRACE: RefCell<Option<Trace>> = const { RefCell::new(None) };
}

/// What a world has come to: of what happened, in which order and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    /// Over all lines.
    pub value: u64,
    /// How many there were.
    pub lines: u64,
}

impl fmt::Display for Digest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:016x} of {} lines", self.value, self.lines)
    }
}

struct Trace {
    digest: Digest,
    line: String,
    /// Where lines are written as well, for whoever looks for the first difference.
    file: Option<File>,
}

/// From now on this thread's world is traced; the lines go into this file too.
pub(crate) fn begin(file: Option<File>) {
    // The basis and, below, the prime of FNV-1a: short, and nobody wants to deceive it.
    let digest = Digest { value: 0xCBF2_9CE4_8422_2325, lines: 0 };
    TRACE.set(Some(Trace { digest, line: String::new(), file }));
}

/// Notes something that happened in the world of this thread, if it has one.
pub fn note(what: fmt::Arguments<'_>) {
    TRACE.with_borrow_mut(|trace| {
        let Some(trace) = trace else { return };
        trace.line.clear();
        writeln!(trace.line, "{} {what}", chance::now_ms()).expect("text is written into memory");
        for byte in trace.line.bytes() {
            trace.digest.value = (trace.digest.value ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
        trace.digest.lines += 1;
        if let Some(file) = &mut trace.file {
            file.write_all(trace.line.as_bytes()).expect("the trace is written");
        }
    });
}

/// What happened on this thread so far.
pub(crate) fn digest() -> Digest {
    TRACE.with_borrow(|trace| trace.as_ref().expect("a simulation runs on this thread").digest)
}
