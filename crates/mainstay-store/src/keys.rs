//! Names of objects. Everything of a replica lies under `v1/<replica>/`.

use object_store::path::Path;
use uuid::Uuid;

/// Root of everything of this format version.
pub(crate) const ROOT: &str = "v1";

pub(crate) fn replica(replica: Uuid) -> Path {
    Path::from(format!("{ROOT}/{replica}"))
}

pub(crate) fn manifests(replica: Uuid) -> Path {
    Path::from(format!("{ROOT}/{replica}/manifest"))
}

/// Versions sort as text.
pub(crate) fn manifest(replica: Uuid, version: u64) -> Path {
    Path::from(format!("{ROOT}/{replica}/manifest/{version:020}"))
}

pub(crate) fn segment(replica: Uuid, segment: Uuid) -> Path {
    Path::from(format!("{ROOT}/{replica}/segment/{segment}"))
}

pub(crate) fn map(replica: Uuid, map: Uuid) -> Path {
    Path::from(format!("{ROOT}/{replica}/map/{map}"))
}

pub(crate) fn definition(replica: Uuid, definition: Uuid) -> Path {
    Path::from(format!("{ROOT}/{replica}/definition/{definition}"))
}

/// A document beside the replicas, whose folder no replica's can be: it is no UUID.
pub(crate) fn document(name: &str) -> Path {
    Path::from(format!("{ROOT}/catalogue/{name}"))
}

pub(crate) fn catalogue() -> Path {
    Path::from(format!("{ROOT}/catalogue"))
}

/// The data keys of an encrypted store.
pub(crate) fn keyring() -> Path {
    Path::from(format!("{ROOT}/keyring"))
}

/// Written and deleted to see whether anything can be written. One that a crash leaves is garbage as any other object that no
/// manifest names.
pub(crate) fn probe(replica: Uuid) -> Path {
    Path::from(format!("{ROOT}/{replica}/probe"))
}

/// The version in a manifest's key.
pub(crate) fn manifest_version(path: &Path) -> Option<u64> {
    path.filename()?.parse().ok()
}
