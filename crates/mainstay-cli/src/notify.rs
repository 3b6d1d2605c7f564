//! Tells the service manager how a daemon fares: sd_notify(3), of which only the datagrams are needed.

use std::{
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    path::Path,
};

/// The daemon does what it is for, from now on.
pub(crate) fn ready(status: &str) {
    tell(&format!("READY=1\nSTATUS={status}"));
}

/// What the daemon does, in words that `systemctl status` shows.
pub(crate) fn status(status: &str) {
    tell(&format!("STATUS={status}"));
}

/// The daemon ends, and not because something is wrong.
pub(crate) fn stopping() {
    tell("STOPPING=1");
}

/// Nobody may be there to be told, and whoever does not hear it says so by himself.
fn tell(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(Path::new(&socket), state) {
        tracing::debug!(%error, "the service manager was not told");
    }
}

fn send(socket: &Path, state: &str) -> io::Result<()> {
    let address = match socket.as_os_str().as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    // A manager that does not read must not hold a daemon up.
    let datagram = UnixDatagram::unbound()?;
    datagram.set_nonblocking(true)?;
    datagram.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_is_told_on_either_kind_of_socket() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("notify");
        let name = format!("mainstay-notify-{}", std::process::id());
        let named = SocketAddr::from_abstract_name(&name).unwrap();
        for (manager, socket) in [
            (UnixDatagram::bind(&path).unwrap(), path.clone()),
            (UnixDatagram::bind_addr(&named).unwrap(), format!("@{name}").into()),
        ] {
            send(&socket, "READY=1").unwrap();
            let mut heard = [0; 64];
            let length = manager.recv(&mut heard).unwrap();
            assert_eq!(&heard[..length], b"READY=1");
        }
        assert!(send(&base.path().join("nobody"), "READY=1").is_err());
    }
}
