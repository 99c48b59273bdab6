//! Key pairs that a scheme does not have fail to compile, with a sentence that says so.

#[test]
fn illegal_key_pairs_do_not_compile() {
    let t = trybuild::TestCases::new();
    t.pass("tests/ui/legal_pair.rs");
    // trybuild runs `cargo check`, which evaluates asserts inside generic functions only where a const item calls
    // them; that is how this case is written.
    t.compile_fail("tests/ui/illegal_pair.rs");
}
