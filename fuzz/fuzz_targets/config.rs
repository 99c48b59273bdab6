//! Any `config.json`, quantisation config or shard index beside sound tensors.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use moe_oracle_fuzz::base::BASES;
use moe_oracle_fuzz::config::{Edit, Splice};
use moe_oracle_fuzz::survive;

#[derive(Arbitrary, Debug)]
struct Input {
    base: u8,
    file: u8,
    edits: Vec<Edit>,
    splices: Vec<Splice>,
}

fuzz_target!(|input: Input| {
    let (base, dir) = &BASES[usize::from(input.base) % BASES.len()];
    let (name, sound) = &base.configs[usize::from(input.file) % base.configs.len()];
    let mut value = sound.clone();
    input.edits.iter().take(6).for_each(|e| e.apply(&mut value));
    let mut text = value.to_string().into_bytes();
    input.splices.iter().take(4).for_each(|s| s.apply(&mut text, usize::MAX));
    std::fs::write(dir.join(name), text).expect("room for a config");
    survive(dir);
    std::fs::write(dir.join(name), sound.to_string()).expect("room for a config");
});
