//! Checks the table, and finds out what CUDA code it names. No row names any yet: when one does, its kernels are
//! compiled here, from this very list, by nvcc.

fn main() {
    println!("cargo::rerun-if-changed=src/oracle/table.toml");
    let text = match std::fs::read_to_string("src/oracle/table.toml") {
        Ok(text) => text,
        Err(e) => return println!("cargo::error=src/oracle/table.toml can't be read: {e}"),
    };
    let table = match moe_oracle_table::parse(&text) {
        Ok(table) => table,
        Err(e) => return println!("cargo::error=src/oracle/table.toml: {e}"),
    };
    let kernels = table.scheme.iter().flat_map(|s| &s.backend).flat_map(|b| &b.kernels);
    for kernel in kernels {
        // A row that names a kernel before this script can compile it would be a promise nobody keeps.
        println!("cargo::error=kernels/{}: this build script does not compile CUDA yet", kernel.file);
    }
}
