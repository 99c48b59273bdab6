//! What the README says is what the crate does: its support matrix and its code. BLESS=1 rewrites them.
#![cfg(feature = "cli")]

use std::path::Path;
use std::process::Command;

#[path = "../examples/embed.rs"]
#[allow(dead_code, reason = "its main is not called here")]
mod embed;

/// The README's text between two comments must be `want`.
fn section(name: &str, want: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let text = std::fs::read_to_string(&path).unwrap().replace("\r\n", "\n");
    let (begin, end) = (format!("<!-- {name} -->\n\n"), format!("\n<!-- end of {name} -->\n"));
    let from = text.find(&begin).unwrap_or_else(|| panic!("no {begin}")) + begin.len();
    let to = from + text[from..].find(&end).unwrap_or_else(|| panic!("no {end}"));
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, format!("{}{want}{}", &text[..from], &text[to..])).unwrap();
        return;
    }
    assert_eq!(&text[from..to], want, "the README's {name} is out of date: BLESS=1 rewrites it");
}

/// One test, for both sections are of one file.
#[test]
fn the_matrix_and_the_code_are_those_of_the_crate() {
    let output = Command::new(env!("CARGO_BIN_EXE_moe-oracle")).args(["select", "--matrix"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    section("matrix", &String::from_utf8(output.stdout).unwrap());

    let (mut code, mut inside) = (String::from("```rust\n"), false);
    let mut regions = 0;
    for line in include_str!("../examples/embed.rs").lines() {
        match line.trim() {
            "// README: from here" => {
                inside = true;
                if regions > 0 {
                    code.push('\n');
                }
                regions += 1;
            }
            "// README: to here" => inside = false,
            // What stands in a function is indented there.
            _ if inside => {
                code.push_str(&format!("{}\n", line.strip_prefix("    ").filter(|_| regions > 1).unwrap_or(line)))
            }
            _ => {}
        }
    }
    code.push_str("```\n");
    assert_eq!((regions, inside), (2, false));
    section("code", &code);
}

#[test]
fn the_code_gives_the_expected_answer() {
    let (checksum, error) = embed::run().unwrap();
    // The fixture's own tolerance for exact activations.
    assert!(error < 0.011 && checksum > 1.0, "{checksum} {error}");
}
