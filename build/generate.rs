//! The Rust code that says what was built.

use crate::compile::Fatbin;
use crate::ptxas;
use crate::toolkit::Toolkit;
use std::fmt::Write;

/// The folder of the images inside `OUT_DIR`.
pub const FOLDER: &str = "fatbins";

/// With kernels.
pub fn built(toolkit: &Toolkit, fatbins: &[Fatbin]) -> String {
    let mut code = format!(
        "pub const NOT_BUILT: Option<&str> = None;\npub const TOOLKIT: (u32, u32) = {:?};\n\
         pub static FATBINS: &[Fatbin] = &[\n",
        toolkit.version
    );
    for f in fatbins {
        // Writing to a String cannot fail.
        let _ = writeln!(
            code,
            "Fatbin {{ name: {:?}, archs: &{:?}, image: image!({:?}), resources: &[",
            f.name,
            f.archs,
            image(f)
        );
        for r in ptxas::parse(&f.report) {
            let ptxas::Resources { kernel, arch, registers, stack_bytes, spill_bytes, shared_bytes } = r;
            let _ = writeln!(
                code,
                "    Resources {{ kernel: {kernel:?}, arch: {arch:?}, registers: {registers}, stack_bytes: \
                 {stack_bytes}, spill_bytes: {spill_bytes}, shared_bytes: {shared_bytes} }},"
            );
        }
        code += "] },\n";
    }
    code + "];\n"
}

fn image(fatbin: &Fatbin) -> String {
    format!("/{FOLDER}/{}", fatbin.file)
}

/// Without, and why.
pub fn not_built(why: &str) -> String {
    format!(
        "pub const NOT_BUILT: Option<&str> = Some({why:?});\npub const TOOLKIT: (u32, u32) = (0, 0);\n\
         pub static FATBINS: &[Fatbin] = &[];\n"
    )
}
