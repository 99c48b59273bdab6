//! Every checkpoint with a known answer, through the command line, with every CPU backend; every broken one refused.
//! The cases are found by walking the folders: `fixtures` beside this file, and the shared collection where there.

#[path = "common/skip.rs"]
mod skip;

use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn collections() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = std::env::var_os("MOE_ORACLE_CHECKPOINTS").map(PathBuf::from);
    let shared = shared.unwrap_or_else(|| root.join("../shared/checkpoints"));
    if !shared.is_dir() {
        skip::skipped("the shared checkpoints are not on this machine");
    }
    [root.join("tests/fixtures"), shared].into_iter().filter(|d| d.is_dir()).collect()
}

fn cases(expect: &str) -> Vec<(PathBuf, Value)> {
    let mut all = Vec::new();
    for dir in collections() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let dir = entry.unwrap().path();
            let Ok(text) = std::fs::read_to_string(dir.join("case.json")) else { continue };
            let case: Value = serde_json::from_str(&text).unwrap();
            if case["expect"] == expect {
                all.push((dir, case));
            }
        }
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn run(case: &Path, input: &Path, output: &Path, backend: &str) -> Output {
    run_on("cpu", case, input, output, backend, false)
}

/// MOE_ORACLE_BIN names the program where the one that cargo built lies elsewhere.
fn run_on(device: &str, case: &Path, input: &Path, output: &Path, backend: &str, exact: bool) -> Output {
    let built = || env!("CARGO_BIN_EXE_moe-oracle").into();
    let mut command = Command::new(std::env::var_os("MOE_ORACLE_BIN").unwrap_or_else(built));
    command.arg("run").arg("--model").arg(case).arg("--input").arg(input).arg("--output").arg(output);
    command.args(["--backend", backend, "--threads", "2", "--device", device]);
    command.args(exact.then_some("--exact-activations")).output().unwrap()
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let t = file.tensor(name).unwrap();
    assert_eq!(t.dtype(), Dtype::F32, "{name}");
    t.data().chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
}

fn ids(file: &SafeTensors<'_>) -> Vec<i32> {
    let t = file.tensor("topk_ids").unwrap();
    t.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Relative Frobenius error, of the whole and of the worst token.
fn errors(got: &[f64], want: &[f64], width: usize) -> (f64, f64) {
    let relative = |g: &[f64], w: &[f64]| {
        let diff: f64 = g.iter().zip(w).map(|(g, w)| (g - w) * (g - w)).sum();
        (diff / w.iter().map(|w| w * w).sum::<f64>()).sqrt()
    };
    assert_eq!(got.len(), want.len());
    assert!(got.iter().all(|g| g.is_finite()));
    let worst = got.chunks(width).zip(want.chunks(width)).map(|(g, w)| relative(g, w)).fold(0.0, f64::max);
    (relative(got, want), worst)
}

/// Sorts a token's experts, whose order is free, together with their weights.
fn sorted(ids: &[i32], weights: &[f64], k: usize) -> Vec<(i32, f64)> {
    let mut pairs: Vec<(i32, f64)> = ids.iter().copied().zip(weights.iter().copied()).collect();
    pairs.chunks_mut(k).for_each(|c| c.sort_by_key(|p| p.0));
    pairs
}

/// With `exact`, nothing but the answer with exact activations will do. `mixed`: a backend that quantises activations from
/// some number of tokens of an expert on, which a shared expert, who gets all tokens, reaches before the others.
fn check(name: &str, case: &Value, exact: bool, mixed: bool, output: &[u8], expected: &[u8]) {
    let (got, want) = (SafeTensors::deserialize(output).unwrap(), SafeTensors::deserialize(expected).unwrap());
    let (width, k) = (case["H"].as_u64().unwrap() as usize, case["topk"].as_u64().unwrap() as usize);
    let output = floats(&got, "output");
    let verdicts: Vec<(String, bool, f64)> = want
        .names()
        .into_iter()
        .filter(|n| *n == "output" || !exact && n.starts_with("output_actq"))
        .map(|n| {
            let kind = if n == "output" { "output" } else { "output_actq" };
            let limit = case["tolerance"][kind].as_f64().unwrap();
            let (all, worst) = errors(&output, &floats(&want, n), width);
            (n.to_string(), all <= limit && worst <= 4.0 * limit, all / limit)
        })
        .collect();
    assert!(verdicts.iter().any(|v| v.1), "{name}: not within tolerance of any answer: {verdicts:?}");
    let (a, b) =
        (sorted(&ids(&got), &floats(&got, "topk_weights"), k), sorted(&ids(&want), &floats(&want, "topk_weights"), k));
    let largest = b.iter().map(|p| p.1.abs()).fold(0.0, f64::max);
    for (a, b) in a.iter().zip(&b) {
        assert_eq!(a.0, b.0, "{name}: expert ids");
        assert!((a.1 - b.1).abs() <= 1e-3 * largest, "{name}: weight {} expected {}", a.1, b.1);
    }
    if want.names().contains(&"output_with_shared") {
        // The known answer leaves activations exact. A backend that quantises them differs by what that costs, which
        // its routed part has just been judged by.
        let exact = verdicts.iter().any(|v| v.0 == "output" && v.1);
        if exact {
            let (all, worst) = errors(&floats(&got, "output_with_shared"), &floats(&want, "output_with_shared"), width);
            // What quantised activations cost of an exact answer: 4 percent for fp8, less for int8.
            let limit = if mixed { 0.06 } else { case["tolerance"]["output"].as_f64().unwrap() };
            assert!(all <= limit && worst <= 4.0 * limit, "{name}: with shared experts {all:.2e}, limit {limit:.2e}");
        }
    }
}

#[test]
fn every_good_checkpoint_is_answered_within_its_tolerance() {
    good("cpu", &[("cpu_reference", false), ("cpu_reference", true), ("cpu_simd", false), ("auto", false)]);
}

#[cfg(feature = "cuda")]
#[test]
fn every_good_checkpoint_is_answered_within_its_tolerance_on_a_gpu() {
    match moe_oracle::cuda::Gpu::open(0) {
        Ok(_) => good(
            "cuda",
            &[("cuda_decode", false), ("cuda_emulation", false), ("cuda_emulation", true), ("auto", false)],
        ),
        Err(why) => skip::skipped(why),
    }
}

/// Backends, and whether to ask them for exact activations.
fn good(device: &str, backends: &[(&str, bool)]) {
    let dir = tempfile::tempdir().unwrap();
    let cases = cases("ok");
    assert!(!cases.is_empty(), "the repository's own fixtures are missing");
    for (case, facts) in &cases {
        for (backend, exact) in backends {
            let name = format!("{} with {backend}, exact: {exact}", case.display());
            let out = dir.path().join("out.safetensors");
            let result = run_on(device, case, &case.join("input.safetensors"), &out, backend, *exact);
            assert!(result.status.success(), "{name}: {}", String::from_utf8_lossy(&result.stderr));
            let said = String::from_utf8_lossy(&result.stdout);
            assert!(said.contains(facts["scheme"].as_str().unwrap()), "{name} does not name its scheme: {said}");
            let expected = std::fs::read(case.join("expected.safetensors")).unwrap();
            let mixed = said.contains("exact for few tokens");
            check(&name, facts, *exact, mixed, &std::fs::read(&out).unwrap(), &expected);
        }
    }
    println!("{} checkpoints", cases.len());
}

#[test]
fn every_broken_checkpoint_is_refused_with_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    for (case, facts) in cases("error") {
        let name = case.display();
        let out = dir.path().join("out.safetensors");
        let result = run(&case, &case.join("input.safetensors"), &out, "auto");
        let said = String::from_utf8_lossy(&result.stderr);
        assert_eq!(result.status.code(), Some(1), "{name}: {said}");
        assert_eq!(said.trim().lines().count(), 1, "{name}: {said}");
        assert!(!out.exists(), "{name} left an output behind");
        let about = facts["about"].as_str().unwrap();
        if let Some(tensor) = about.split_whitespace().next().filter(|w| w.contains(".experts.")) {
            assert!(said.contains(tensor), "{name}: {said} does not name {tensor}");
        }
    }
}
