//! `oracle_table!("path")`: turns moe-oracle's table into oracle types.

mod expand;

use proc_macro::TokenStream;

/// Expands the table at a path relative to the crate's manifest: per scheme a backend enum, a zero-sized oracle type
/// with quant keys as const parameters, aliases for its legal pairs and one zero-sized kernel type per backend; for
/// all together the user-facing names and the list of pairs for run-time keys.
#[proc_macro]
pub fn oracle_table(input: TokenStream) -> TokenStream {
    let path = syn::parse_macro_input!(input as syn::LitStr);
    let result = read(&path.value()).and_then(|(file, text)| Ok((file, moe_oracle_table::parse(&text)?)));
    match result {
        Ok((file, table)) => expand::table(&file, &table).into(),
        Err(e) => syn::Error::new(path.span(), e).to_compile_error().into(),
    }
}

fn read(path: &str) -> Result<(String, String), String> {
    let root = std::env::var("CARGO_MANIFEST_DIR").map_err(|e| e.to_string())?;
    let file = format!("{root}/{path}");
    let text = std::fs::read_to_string(&file).map_err(|e| format!("cannot read the table {path}: {e}"))?;
    Ok((file, text))
}
