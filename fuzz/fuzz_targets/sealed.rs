#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mainstay_store::fuzzing::sealed(data));
