//! Any tensors beside a config that is sound or nearly so.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use moe_oracle_fuzz::base::BASES;
use moe_oracle_fuzz::config;
use moe_oracle_fuzz::survive;
use moe_oracle_fuzz::tensors::{Damage, Edit, File};

#[derive(Arbitrary, Debug)]
struct Input {
    base: u8,
    fit: bool,
    edits: Vec<Edit>,
    damage: Damage,
    config: Vec<config::Edit>,
    /// Chooses what is spoilt beside tensors: seldom the file or the config as a whole, which would hide the rest.
    also: u8,
}

fuzz_target!(|input: Input| {
    let (base, dir) = &BASES[usize::from(input.base) % BASES.len()];
    let mut file = File(base.tensors.clone());
    input.edits.iter().take(6).for_each(|e| file.edit(e, input.fit));
    let damage = if input.also % 16 == 1 { &input.damage } else { &Damage::None };
    std::fs::write(dir.join(base.file()), file.bytes(damage)).expect("room for tensors");
    let edited = input.also % 4 == 2 && !input.config.is_empty();
    let config = base.configs.iter().find(|c| c.0 == "config.json").filter(|_| edited);
    if let Some((name, sound)) = config {
        let mut value = sound.clone();
        input.config.iter().take(2).for_each(|e| e.apply(&mut value));
        std::fs::write(dir.join(name), value.to_string()).expect("room for a config");
    }
    survive(dir);
    if let Some((name, sound)) = config {
        std::fs::write(dir.join(name), sound.to_string()).expect("room for a config");
    }
});
