//! `select --jsonl` over the decisions of another engine's selection code: what that engine serves on a CPU or an NVIDIA
//! GPU that we have kernels for, we serve.
#![cfg(feature = "cli")]

#[path = "common/skip.rs"]
mod skip;

use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// The folder with the recorded decisions, where this checkout has one.
fn golden() -> Option<PathBuf> {
    let beside = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/golden"));
    let folder = std::env::var_os("MOE_ORACLE_GOLDEN").map_or_else(beside, PathBuf::from);
    let file = folder.join("decisions.jsonl");
    file.exists().then_some(file)
}

fn lines(bytes: &[u8]) -> Vec<Value> {
    bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty()).map(|l| serde_json::from_slice(l).unwrap()).collect()
}

#[test]
fn every_decision_is_covered_and_every_refusal_has_a_reason() {
    let Some(file) = golden() else {
        skip::skipped("no recorded decisions (set MOE_ORACLE_GOLDEN to their folder)");
        return;
    };
    let questions = lines(&std::fs::read(&file).unwrap());
    let start = Instant::now();
    let output =
        Command::new(env!("CARGO_BIN_EXE_moe-oracle")).args(["select", "--jsonl"]).arg(&file).output().unwrap();
    let took = start.elapsed();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let limit = Duration::from_secs(if cfg!(debug_assertions) { 10 } else { 1 });
    assert!(took < limit, "{took:?} for {} lines", questions.len());

    let answers = lines(&output.stdout);
    assert_eq!(answers.len(), questions.len());
    let (mut served, mut wanted) = (0, 0);
    for (q, a) in questions.iter().zip(&answers) {
        let id = &q["id"];
        assert_eq!(&a["id"], id);
        let backend = a["backend"].as_str();
        served += usize::from(backend.is_some());
        let theirs = q["result"].as_str().filter(|r| *r != "NONE");
        let here = q["platform"].as_str().is_some_and(|p| p.starts_with("sm_") || p.starts_with("cpu_"));
        // LoRA is served nowhere.
        if here && theirs.is_some() && q["lora"] != Value::Bool(true) {
            wanted += 1;
            assert!(backend.is_some(), "{id}: they have {theirs:?}, we say {}", a["error"]);
        }
        let text = |v: &Value| v.as_str().is_some_and(|s| !s.is_empty());
        let candidates = a["candidates"].as_array().unwrap();
        for c in candidates {
            assert_eq!(c["supported"] == Value::Bool(false), text(&c["reason"]), "{id}: {c}");
        }
        let each = !candidates.is_empty() && candidates.iter().all(|c| text(&c["reason"]));
        assert!(backend.is_some() || text(&a["error"]) || each, "{id}: refused without a reason");
        if let Some(backend) = backend {
            let mine = candidates.iter().find(|c| c["backend"] == backend);
            assert_eq!(mine.map(|c| &c["supported"]), Some(&Value::Bool(true)), "{id}");
            assert_eq!(a["error"], Value::Null, "{id}");
        }
    }
    println!("{served} of {} lines have a backend; all {wanted} that must; {took:?}", answers.len());
}
