//! Checks the table and, with the feature `cuda`, compiles every CUDA kernel that it names.
//!
//! Without nvcc the build goes on: the generated code then says why there are no kernels.

#[path = "build/arch.rs"]
mod arch;
#[path = "build/compile.rs"]
mod compile;
#[path = "build/generate.rs"]
mod generate;
#[path = "build/ptxas.rs"]
mod ptxas;
#[path = "build/sources.rs"]
mod sources;
#[path = "build/toolkit.rs"]
mod toolkit;

use moe_oracle_table::Table;
use std::env;
use std::path::PathBuf;
use toolkit::Missing;

const TABLE: &str = "src/oracle/table.toml";
const ARCHS: &str = "MOE_ORACLE_CUDA_ARCHS";

fn main() {
    println!("cargo::rerun-if-changed={TABLE}");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    if let Err(e) = run() {
        // Cargo takes one line per error; nvcc writes many.
        e.lines().for_each(|line| println!("cargo::error={line}"));
    }
}

fn run() -> Result<(), String> {
    let text = std::fs::read_to_string(TABLE).map_err(|e| format!("{TABLE} can't be read: {e}"))?;
    let table = moe_oracle_table::parse(&text).map_err(|e| format!("{TABLE}: {e}"))?;
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    println!("cargo::rerun-if-changed={}", compile::KERNELS);
    let variables = toolkit::VARIABLES.iter().chain(&compile::VARIABLES).chain(&[ARCHS, "DOCS_RS"]);
    variables.for_each(|v| println!("cargo::rerun-if-env-changed={v}"));

    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: cargo runs this script")?);
    let code = kernels(&table, &out)?;
    let file = out.join("fatbins.rs");
    std::fs::write(&file, code).map_err(|e| format!("{} can't be written: {e}", file.display()))
}

/// The generated code.
fn kernels(table: &Table, out: &std::path::Path) -> Result<String, String> {
    if env::var_os("DOCS_RS").is_some() {
        return Ok(generate::not_built("this build is for the documentation"));
    }
    let archs = arch::parse_list(&env::var(ARCHS).unwrap_or_else(|_| arch::DEFAULT.into()))?;
    let toolkit = match toolkit::find() {
        Ok(toolkit) => toolkit,
        Err(Missing::Broken(why)) => return Err(why),
        Err(Missing::Absent(why)) => {
            // PATH differs between shells and editors: where nvcc is found, that is no reason to build anew.
            println!("cargo::rerun-if-env-changed=PATH");
            println!("cargo::warning=no CUDA kernels in this build: {why}");
            return Ok(generate::not_built(&why));
        }
    };
    let fatbins = compile::all(&toolkit, &archs, &table.specialisations(), &out.join(generate::FOLDER))?;
    Ok(generate::built(&toolkit, &fatbins))
}
