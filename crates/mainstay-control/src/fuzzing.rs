//! What fuzzing (`fuzz/`) gives its bytes to.

/// A document of the catalogue, as it lies in the store or within its envelope.
///
/// # Panics
/// When something is wrong with this crate.
pub fn catalogue(data: &[u8]) {
    let inside = mainstay_store::fuzzing::document(data);
    for document in [inside.as_deref(), Some(data)].into_iter().flatten() {
        crate::catalogue::read_any(document);
    }
}
