//! Key pairs that a scheme does not have fail to compile, with a sentence that says so.

#[test]
fn illegal_key_pairs_do_not_compile() {
    let t = trybuild::TestCases::new();
    t.pass("tests/ui/legal_pair.rs");
    // Asserts inside generic functions wait for codegen, which `cargo check` (and so trybuild) does not reach unless
    // the program as a whole is built or a const item calls the function; these cases do the latter.
    t.compile_fail("tests/ui/illegal_pair.rs");
}
