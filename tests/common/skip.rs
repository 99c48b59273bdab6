//! A test that cannot run here says so on stderr itself: the harness hides what passing tests print.

use std::io::Write;

pub fn skipped(why: impl std::fmt::Display) {
    // Nobody is left to be told where even that fails.
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
}
