use proptest::prelude::*;

use super::*;

/// Runs as (gap, disk step, count, zero?, seed of the content).
fn runs() -> impl Strategy<Value = Vec<(u64, u16, u8, bool, u8)>> {
    proptest::collection::vec((0u64..1000, 0u16..2, 1u8..4, any::<bool>(), any::<u8>()), 1..20)
}

fn build(spec: &[(u64, u16, u8, bool, u8)], effort: Effort) -> (Vec<FrameRun>, Vec<u8>, Bytes) {
    let mut builder = FrameBuilder::new();
    let (mut disk, mut end) = (0, 0);
    let mut data = Vec::new();
    for &(gap, step, count, zero, seed) in spec {
        if step > 0 {
            disk += step;
            end = 0;
        }
        let block = end + gap;
        end = block + u64::from(count);
        if zero {
            builder.push_zero(disk, block, u32::from(count)).unwrap();
        } else {
            let bytes: Vec<u8> =
                (0..usize::from(count) * BLOCK_LENGTH).map(|at| (at as u8).wrapping_mul(seed)).collect();
            builder.push_data(disk, block, &bytes).unwrap();
            data.extend_from_slice(&bytes);
        }
    }
    (builder.runs.clone(), data, builder.finish(effort).unwrap())
}

fn efforts() -> impl Strategy<Value = Effort> {
    prop_oneof![Just(Effort::Small), Just(Effort::Fast), Just(Effort::None)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_goes_in_comes_out(spec in runs(), effort in efforts()) {
        let (runs, data, bytes) = build(&spec, effort);
        prop_assert!(bytes.len() <= FRAME_BYTES_MAX);
        prop_assert_eq!(frame_length(&bytes).unwrap(), bytes.len());
        let frame = Frame::decode(&bytes).unwrap();
        prop_assert_eq!(&frame.runs, &runs);
        prop_assert_eq!(frame.payload.as_ref(), data.as_slice());
    }

    #[test]
    fn every_flipped_bit_is_noticed(spec in runs(), effort in efforts(), at in any::<usize>(), bit in 0u8..8) {
        let (_, _, bytes) = build(&spec, effort);
        let mut bytes = bytes.to_vec();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        prop_assert!(Frame::decode(&Bytes::from(bytes)).is_err());
    }

    #[test]
    fn frames_of_former_versions_are_read_and_verified(
        spec in runs(),
        effort in efforts(),
        version in 1..3u8,
        at in any::<usize>(),
    ) {
        let (runs, data, bytes) = build(&spec, effort);
        let mut bytes = bytes.to_vec();
        bytes[4] = version;
        prop_assert_eq!(Frame::decode(&bytes.clone().into()).unwrap_err(), FrameError::Checksum);
        let summed = [&bytes[..CHECKSUM_AT], &bytes[FRAME_HEADER_BYTES..]].concat();
        let sum: [u8; 16] = if version == 1 {
            *blake3::hash(&summed).as_bytes().first_chunk().unwrap()
        } else {
            let key = highway::Key([0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0, 0x082e_fa98_ec4e_6c89]);
            let words = HighwayHasher::new(key).hash128(&summed);
            *words.map(u64::to_le_bytes).concat().first_chunk().unwrap()
        };
        bytes[CHECKSUM_AT..FRAME_HEADER_BYTES].copy_from_slice(&sum);
        let frame = Frame::decode(&bytes.clone().into()).unwrap();
        prop_assert_eq!((&frame.runs, frame.payload.as_ref()), (&runs, data.as_slice()));
        let at = at % bytes.len();
        bytes[at] ^= 1;
        prop_assert!(Frame::decode(&bytes.into()).is_err());
    }

    #[test]
    fn hostile_bytes_with_a_valid_checksum_never_panic(
        spec in runs(),
        effort in efforts(),
        edits in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..8),
        cut in any::<usize>(),
    ) {
        let (_, _, bytes) = build(&spec, effort);
        let mut bytes = bytes.to_vec();
        bytes.truncate(FRAME_HEADER_BYTES + cut % bytes.len());
        for (at, value) in edits {
            let at = at % bytes.len().min(200);
            bytes[at] = value;
        }
        let sum = checksum(&bytes);
        bytes[CHECKSUM_AT..FRAME_HEADER_BYTES].copy_from_slice(&sum);
        let _ = Frame::decode(&Bytes::from(bytes));
    }

    #[test]
    fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Frame::decode(&Bytes::from(bytes)).is_err());
    }
}

#[test]
fn incompressible_data_is_stored_raw_and_zeros_cost_nothing() {
    let mut state = 1u64;
    let noise: Vec<u8> = (0..FRAME_BLOCKS_MAX * BLOCK_LENGTH)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    let mut builder = FrameBuilder::new();
    for (at, block) in noise.chunks(BLOCK_LENGTH).enumerate() {
        builder.push_data(3, at as u64 * 50, block).unwrap();
    }
    assert_eq!(builder.room(), 0);
    let bytes = builder.finish(Effort::Small).unwrap();
    assert_eq!(bytes[5], 0);
    assert!(bytes.len() < noise.len() + 300, "headers take {} bytes", bytes.len() - noise.len());

    let mut builder = FrameBuilder::new();
    builder.push_zero(0, 0, u32::MAX).unwrap();
    builder.push_zero(0, u64::from(u32::MAX), 5).unwrap();
    assert!(builder.finish(Effort::Small).unwrap().len() < 64);
}

#[test]
fn a_whole_frame_is_taken_without_a_copy_and_is_the_same_frame() {
    let data = Bytes::from(vec![7; FRAME_BLOCKS_MAX * BLOCK_LENGTH]);
    let mut whole = FrameBuilder::new();
    whole.push_zero(0, 0, 9).unwrap();
    whole.push_bytes(0, 9, data.clone()).unwrap();
    assert!(matches!(whole.payload, Payload::Whole(_)));
    assert_eq!(whole.room(), 0);
    assert!(whole.push_bytes(0, 100, data.clone()).is_err());
    assert!(whole.push_data(0, 100, &data[..1]).is_err());
    let mut copied = FrameBuilder::new();
    copied.push_zero(0, 0, 9).unwrap();
    copied.push_bytes(0, 9, data.slice(..BLOCK_LENGTH)).unwrap();
    copied.push_bytes(0, 10, data.slice(BLOCK_LENGTH..)).unwrap();
    for effort in [Effort::Small, Effort::Fast, Effort::None] {
        let mut again = FrameBuilder::new();
        again.push_zero(0, 0, 9).unwrap();
        again.push_data(0, 9, &data).unwrap();
        let expected = again.finish(effort).unwrap();
        let mut whole = FrameBuilder::new();
        whole.push_zero(0, 0, 9).unwrap();
        whole.push_bytes(0, 9, data.clone()).unwrap();
        let parts = whole.finish_in_parts(effort).unwrap();
        assert_eq!([&parts.head[..], &parts.blocks].concat(), expected);
        assert_eq!(parts.len(), expected.len());
        assert_eq!(parts.blocks.as_ptr() == data.as_ptr(), effort == Effort::None);
    }
    assert_eq!(copied.finish(Effort::Small).unwrap(), whole.finish(Effort::Small).unwrap());
}

#[test]
fn order_is_enforced() {
    let mut builder = FrameBuilder::new();
    builder.push_zero(1, 10, 5).unwrap();
    assert!(builder.push_zero(1, 14, 1).is_err());
    assert!(builder.push_zero(0, 100, 1).is_err());
    builder.push_zero(1, 15, 1).unwrap();
    builder.push_data(1, 16, b"tail").unwrap();
    assert_eq!(builder.runs.len(), 2);
}

/// A frame that says it has one block, with this payload and a good checksum.
fn lying(codec: u8, packed: &[u8]) -> Bytes {
    let mut honest = FrameBuilder::new();
    // Noise, so that the frame has room for what is put in its place.
    let noise: Vec<u8> = (0..FRAME_BLOCKS_MAX * BLOCK_LENGTH).map(|at| (at * at / 7 % 251) as u8).collect();
    honest.push_data(0, 0, &noise).unwrap();
    let mut bytes = honest.finish(Effort::None).unwrap().to_vec();
    bytes.truncate(bytes.len() - noise.len());
    bytes[5] = codec;
    bytes[12..16].copy_from_slice(&(packed.len() as u32).to_le_bytes());
    bytes.extend_from_slice(packed);
    let sum = checksum(&bytes);
    bytes[CHECKSUM_AT..FRAME_HEADER_BYTES].copy_from_slice(&sum);
    bytes.into()
}

#[test]
fn a_payload_that_expands_to_more_than_it_says_is_refused() {
    let plain = FRAME_BLOCKS_MAX * BLOCK_LENGTH;
    for (bytes, is_good) in [(plain, true), (plain + 1, false), (plain - 1, false), (256 << 20, false)] {
        let zeros = vec![0; bytes];
        for (codec, packed) in [
            (CODEC_ZSTD, zstd::bulk::compress(&zeros, 1).unwrap()),
            (CODEC_LZ4, lz4_flex::block::compress(&zeros)),
        ] {
            let frame = lying(codec, &packed);
            match Frame::decode(&frame) {
                Ok(decoded) => {
                    assert!(is_good && decoded.payload.len() == plain, "codec {codec}, {bytes} bytes");
                }
                // What is longer than a frame's blocks is refused by its header alone.
                Err(error) => assert!(
                    !is_good
                        && matches!(error, FrameError::Payload | FrameError::Malformed("payload length")),
                    "codec {codec}, {bytes} bytes: {error}"
                ),
            }
        }
    }
}
