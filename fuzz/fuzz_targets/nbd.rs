#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mainstay_nbd::fuzzing::nbd(data));
