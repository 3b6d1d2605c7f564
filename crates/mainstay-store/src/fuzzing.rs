//! What fuzzing (`fuzz/`) gives its bytes to. Checksums are made right first, behind which nothing would ever be reached, and
//! objects are asked for under the names that they give themselves.

use bytes::Bytes;
use uuid::Uuid;

use crate::{
    catalogue,
    cipher::{self, Copy, DataKey, Header},
    envelope,
    manifest::{self, Manifest},
    map_file::{self, ChunkRef, Footer, MapRef},
    segment,
    storage::Copies,
};

/// A whole segment.
///
/// # Panics
/// When something is wrong with this crate.
pub fn segment(data: &[u8]) {
    let mut bytes = data.to_vec();
    let (Some(trailer), true) =
        (bytes.len().checked_sub(segment::TRAILER_BYTES), bytes.len() >= segment::HEADER_BYTES)
    else {
        return assert!(segment::verify(&bytes.into(), Uuid::nil(), Uuid::nil()).is_err(), "it is too short");
    };
    let frames = segment::word(&bytes, trailer);
    if let Some(index_at) = frames.checked_mul(8).and_then(|index| trailer.checked_sub(index)) {
        let sum = segment::checksum(&bytes[..segment::HEADER_BYTES], &bytes[index_at..trailer + 8]);
        bytes[trailer + 8..trailer + 24].copy_from_slice(&sum);
    }
    let id_at = |at: usize| Uuid::from_slice(&bytes[at..at + 16]).unwrap_or_default();
    let (replica, id) = (id_at(16), id_at(32));
    if let Ok(damaged) = segment::verify(&Bytes::from(bytes), replica, id) {
        assert!(damaged.len() <= frames, "no more frames are damaged than there are");
    }
}

/// A whole map of a layer.
///
/// # Panics
/// When something is wrong with this crate.
pub fn layer(data: &[u8]) {
    let Some(trailer) = data.len().checked_sub(map_file::TRAILER_BYTES) else { return };
    let (body, trailer) = data.split_at(trailer);
    let Some(at) = body.len().checked_sub(segment::word(trailer, 0)) else { return };
    let (chunks, footer) = body.split_at(at);
    let sum = map_file::long_sum(footer);
    let whole =
        [footer, &(footer.len() as u32).to_le_bytes(), sum.as_slice(), map_file::MAGIC.as_slice()].concat();
    let named = postcard::from_bytes::<Footer>(footer).map(|footer| (footer.replica, footer.map));
    let (replica, id) = named.unwrap_or_default();
    let reference = MapRef {
        id,
        bytes: data.len() as u64,
        footer_bytes: whole.len() as u32,
        footer_sum: sum,
        entries: 0,
        blocks: 0,
    };
    let Ok(footer) = map_file::decode_footer(&whole, &reference, replica) else { return };
    for chunk in &footer.chunks {
        let end = chunk.offset.checked_add(u64::from(chunk.bytes)).and_then(|end| usize::try_from(end).ok());
        let Some(bytes) = end.and_then(|end| chunks.get(chunk.offset as usize..end)) else { continue };
        let chunk = ChunkRef { sum: map_file::short_sum(bytes), ..chunk.clone() };
        if let Ok(entries) = map_file::decode_chunk(&chunk, &footer.segments, bytes) {
            assert!(
                entries.windows(2).all(|pair| pair[0].end() <= pair[1].start),
                "the entries of a chunk are sorted"
            );
            assert!(
                entries.iter().all(|entry| entry.start >= chunk.first && entry.end() <= chunk.end),
                "a chunk holds what the footer says"
            );
        }
    }
}

/// An object in an envelope whose first copy's checksum is made right, and whose second copy is what the data says.
fn object(data: &[u8], context: &[u8]) -> Option<Copies> {
    let (first, second) = data.split_at(data.len() / 2);
    let packed = first.get(envelope::HEADER_BYTES..)?;
    let sum = envelope::checksum(&first[..16], context, packed);
    let first = [&first[..16], sum.as_slice(), packed].concat();
    Some(Copies::new([first.into(), Bytes::copy_from_slice(second)]))
}

/// A manifest, as it lies in the store or within its envelope.
///
/// # Panics
/// When something is wrong with this crate.
pub fn manifest(data: &[u8]) {
    let inside = object(data, &[]).and_then(|object| manifest::ENVELOPE.read(&[], &object).ok());
    let inside = inside.map(|opened| opened.document);
    for plain in [inside.as_deref(), Some(data)].into_iter().flatten() {
        let Ok(named) = postcard::from_bytes::<Manifest>(plain) else { continue };
        let decode = |copy: Vec<u8>| {
            let copy = Bytes::from(copy);
            Manifest::decode(&Copies::new([copy.clone(), copy]), named.replica, named.version)
        };
        let copy = manifest::ENVELOPE.seal(&[], plain).expect("what was read has room");
        if let Ok((decoded, _)) = decode(copy) {
            let again = decoded.encode().expect("what was read can be written");
            assert_eq!(decode(again), Ok((decoded, false)));
        }
    }
}

/// A document of the catalogue in its envelope; answers what is in it.
pub fn document(data: &[u8]) -> Option<Vec<u8>> {
    let name = b"fuzz";
    catalogue::ENVELOPE.read(name, &object(data, name)?).ok().map(|opened| opened.document)
}

/// A sealed copy of an object: whatever its header says, no more comes out than went in.
///
/// # Panics
/// When something is wrong with this crate.
pub fn sealed(data: &[u8]) {
    let key = DataKey { id: Uuid::nil(), secret: [7; 32] };
    let Some(copy) = Header::parse(data).and_then(|header| Copy::open(header, &key, "fuzz")) else { return };
    let (plain, _) = copy.unseal(0, &data[cipher::HEADER_BYTES..]);
    assert!(plain.len() <= data.len() + cipher::CHUNK_BYTES, "what is missing is not made up");
}
