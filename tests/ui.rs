//! Key pairs that a scheme does not have fail to compile, with a sentence that says so.

#[path = "common/skip.rs"]
mod skip;

use std::path::Path;
use std::process::{Command, Output};

/// The compiler whose rendering `illegal_pair.stderr` holds.
const BLESSED: &str = "rustc 1.95.";

/// `cargo check`, which evaluates asserts inside generic functions only where a const item calls them; that is how the
/// cases are written.
fn check(case: &str) -> Output {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ui");
    let dir = scratch.join(case);
    std::fs::create_dir_all(dir.join("src")).unwrap();
    std::fs::copy(root.join(format!("tests/ui/{case}.rs")), dir.join("src/main.rs")).unwrap();
    // The same versions, and nothing to download.
    std::fs::copy(root.join("Cargo.lock"), dir.join("Cargo.lock")).unwrap();
    let manifest = format!(
        "[package]\nname = \"{case}\"\nedition = \"2024\"\n[dependencies]\nmoe-oracle = {{ path = {root:?}, default-features = false }}\n[workspace]\n"
    );
    std::fs::write(dir.join("Cargo.toml"), manifest).unwrap();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args(["check", "--offline", "--color", "never"]).current_dir(dir);
    cargo.env("CARGO_TARGET_DIR", scratch.join("target"));
    // Flags of the tests' own build, a sanitizer say, are none of the case's.
    for flags in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_BUILD_RUSTFLAGS"] {
        cargo.env_remove(flags);
    }
    cargo.output().unwrap()
}

#[test]
fn illegal_key_pairs_do_not_compile() {
    let legal = check("legal_pair");
    assert!(legal.status.success(), "{}", String::from_utf8_lossy(&legal.stderr));

    let illegal = check("illegal_pair");
    let said = String::from_utf8(illegal.stderr).unwrap();
    assert!(!illegal.status.success(), "an illegal pair compiles");
    let sentence = "the `fp8` oracle has no kernel for this pair of weight and activation keys: use one of its aliases";
    assert!(said.contains(sentence), "{said}");
    assert_eq!(said.matches("error[").count(), 1, "{said}");
    assert!(said.contains("error[E0080]"), "{said}");
}

/// The message as a whole. It is rustc's, and differs between its releases and with its sources installed.
#[test]
fn the_message_is_short() {
    let rustc = |arg: &[&str]| {
        let output = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into())).args(arg).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let sources = Path::new(rustc(&["--print", "sysroot"]).trim()).join("lib/rustlib/src/rust");
    if !rustc(&["--version"]).starts_with(BLESSED) || sources.exists() {
        skip::skipped(format_args!("the message was recorded with {BLESSED}* without rust-src"));
        return;
    }
    // Nothing but what must fail: with a case that passes, it would not check but compile the library, and all kernels.
    let t = trybuild::TestCases::new();
    t.compile_fail("tests/ui/illegal_pair.rs");
}
