//! The program inside the ledger guest.
//!
//! `ledger run` writes numbered records to two disks in a fixed order and acknowledges each one to the
//! host only when both disks have it. Whatever a recovery does to the disks, `ledger status` can then say
//! whether they hold a whole prefix of what was acknowledged. The formats are described in
//! [`record`], [`boots`] and [`writer`].
//!
//! The binary is linked statically and has no runtime: it is the only program of ours in the guest.

mod boots;
mod crc;
mod load;
mod record;
mod ring;
mod settings;
mod status;
mod verify;
mod writer;

use std::io::{self, Write as _};
use std::process::ExitCode;

fn main() -> ExitCode {
    let result = match std::env::args().nth(1).as_deref() {
        Some("run") => writer::run(),
        Some("status") => status::print(),
        Some("load") => load::run(&std::env::args().skip(2).collect::<Vec<_>>()),
        _ => Err(io::Error::other("usage: ledger run | ledger status | ledger load …")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The console is the only place left to complain to; failing to do so changes nothing.
            let _ = writeln!(io::stderr(), "ledger: {error}");
            ExitCode::FAILURE
        }
    }
}
