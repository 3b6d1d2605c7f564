//! What fuzzing (`fuzz/`) gives its bytes to.

/// A request's body (its first byte chooses the operation), which is also read as a filter and as a query.
pub fn arm_body(data: &[u8]) {
    crate::http::fuzz(data);
}
