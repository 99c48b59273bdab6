//! The command line as a user meets it: exit statuses, sentences, JSON.
#![cfg(feature = "cli")]

use serde_json::Value;
use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Output, Stdio};

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moe-oracle")).args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Exit status 1 with one line on stderr, which is returned.
fn sentence(output: &Output) -> String {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

fn jsonl(lines: &str) -> Vec<Value> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_moe-oracle"))
        .args(["select", "--jsonl", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    stdout(&child.wait_with_output().unwrap()).lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn usage_errors_exit_with_2() {
    for args in [
        &["select"][..],
        &["select", "--scheme", "fp9"],
        &["select", "--scheme", "fp8", "--weight-key", "nonsense"],
        &["select", "--scheme", "fp8", "--platform", "vax"],
        &["select", "--scheme", "fp8", "--backend", "nonsense"],
        &["bench", "--preset", "nonsense"],
        &["bench", "--preset", "tiny", "--tokens", "0"],
        &["bench", "--threads", "0"],
        &["bench", "--skew", "-1"],
        &["bench", "--skew", "much"],
        &["bench", "--device", "gpu"],
        &["bench", "--preset", "tiny,nonsense"],
        &["doctor", "--nonsense"],
        &["nonsense"],
    ] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn failures_exit_with_1_and_one_sentence() {
    for (args, word) in [
        (&["select", "--scheme", "fp8", "--lora"][..], "LoRA"),
        (&["select", "--scheme", "fp8", "--platform", "rocm"], "rocm"),
        (&["select", "--scheme", "fp8", "--topk", "129"], "top-k"),
        (&["select", "--scheme", "fp8", "--backend", "aiter"], "aiter"),
        (&["select", "--scheme", "int8", "--weight-key", "MXFP4_STATIC"], "no kernel for this pair"),
        (&["select", "--jsonl", "no/such/file"], "no/such/file"),
        // No machine has that many, so that the sentence comes with and without a GPU.
        (&["bench", "--device", "cuda:9999"], if cfg!(feature = "cuda") { "driver" } else { "`--features cuda`" }),
        (&["bench", "--preset", "tiny", "--anchors", "peers.json"], "--device cuda"),
        (&["bench", "--preset", "tiny", "--backend", "aiter"], "aiter"),
    ] {
        let said = sentence(&run(args));
        assert!(said.contains(word), "{args:?}: {said}");
    }
}

#[test]
fn select_names_the_backend_and_the_reason() {
    let text = stdout(&run(&["select", "--scheme", "fp8", "--explain"]));
    assert!(text.contains("backend   cpu_") && text.contains("why ") && text.contains("FP8_STATIC_128_BLOCK_SYM"));
    assert!(text.contains("candidate cpu_reference: serves this layer"), "{text}");

    let args = ["select", "--scheme", "mxfp4", "--activation-key", "kMxfp8Dynamic", "--backend", "emulation", "--json"];
    let answer: Value = serde_json::from_str(&stdout(&run(&args))).unwrap();
    assert_eq!(answer["backend"], "cpu_reference");
    assert_eq!(answer["weight_key"], "MXFP4_STATIC");
    assert_eq!(answer["activation_key"], "MXFP8_DYNAMIC");
}

#[test]
fn a_bad_line_spoils_only_itself() {
    const GOOD: &str = r#""scheme":"fp8","platform":"cpu_avx512","hidden":2048,"intermediate":768,"num_experts":128,"topk":8,"weight_key":"kFp8Static128BlockSym""#;
    let dynamic = r#""activation_key":"kFp8Dynamic128Sym""#;
    let answers = jsonl(&format!(
        "{{\"id\":1,{GOOD},{dynamic}}}\nnot json\n{{\"id\":\"x\",\"scheme\":\"fp8\"}}\n\n\
         {{\"id\":2,{GOOD},{dynamic},\"activation\":\"sine\"}}\n\
         {{\"id\":3,{GOOD},\"activation_key\":\"kMxfp4Dynamic\"}}\n\
         {{\"id\":4,{GOOD},{dynamic},\"requested_backend\":\"abacus\"}}\n\
         {{\"id\":5,{GOOD},{dynamic},\"is_act_and_mul\":false}}\n\
         {{\"id\":6,{GOOD},{dynamic},\"use_ep\":true,\"ep\":8}}"
    ));
    let ids: Vec<_> = answers.iter().map(|a| a["id"].clone()).collect();
    assert_eq!(Value::from(ids), serde_json::json!([1, null, "x", 2, 3, 4, 5, 6]));
    let backends: Vec<_> = answers.iter().map(|a| a["backend"].is_string()).collect();
    assert_eq!(backends, [true, false, false, false, false, false, false, true]);
    for (i, word) in [(1, "not JSON"), (2, "platform"), (3, "sine"), (5, "emulation"), (6, "is_act_and_mul")] {
        assert!(answers[i]["error"].as_str().unwrap().contains(word), "{}", answers[i]);
    }
    let refused = answers[4]["candidates"].as_array().unwrap();
    assert!(!refused.is_empty() && refused.iter().all(|c| c["reason"] == "no kernel for this pair of keys"));
}

#[cfg(unix)]
#[test]
fn a_closed_pipe_is_a_quiet_end() {
    let line = r#"{"scheme":"fp8","platform":"sm_90","hidden":1,"intermediate":1,"num_experts":1,"topk":1}"#;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{line}\n").repeat(20_000)).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_moe-oracle"))
        .args(["select", "--jsonl"])
        .arg(file.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn bench_writes_rows_and_a_plot() {
    let folder = tempfile::tempdir().unwrap();
    let (json, plot) = (folder.path().join("rows.json"), folder.path().join("plot.svg"));
    let text = stdout(&run(&[
        "bench",
        "--preset",
        "tiny",
        "--scheme",
        "all",
        "--tokens",
        "1,8",
        "--threads",
        "2",
        "--backend",
        "cpu_reference",
        "--skew",
        "1.5",
        "--json",
        json.to_str().unwrap(),
        "--plot",
        plot.to_str().unwrap(),
    ]));
    assert!(text.contains("int4-g32") && text.contains("GB/s read"), "{text}");
    assert!(text.contains("Zipf's law with exponent 1.5"), "{text}");

    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let set = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<BTreeSet<_>>();
    assert_eq!(keys(&report), set(&["machine", "limits", "skew", "rows"]));
    assert_eq!(keys(&report["machine"]), set(&["cpu", "cores", "isa"]));
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 24);
    for row in rows {
        let want = "preset scheme weight_key activation_key backend device threads tokens distinct_experts us floor_us ratio gbps gflops \
                    read_limit_gbps read_share f32_share int8_share";
        assert_eq!(keys(row), want.split(' ').map(String::from).collect(), "{row}");
        assert_eq!((&row["backend"], &row["threads"]), (&Value::from("cpu_reference"), &Value::from(2)));
        // Null where the processor has no VNNI.
        assert!(row["int8_share"].is_null() || row["int8_share"].as_f64().unwrap() > 0.0, "{row}");
        // One token uses exactly its two experts; eight use at most the eight that there are.
        let distinct = row["distinct_experts"].as_f64().unwrap();
        assert!(if row["tokens"] == 1 { distinct == 2.0 } else { distinct > 2.0 && distinct <= 8.0 }, "{row}");
        assert!(
            ["us", "floor_us", "ratio", "read_limit_gbps", "read_share", "f32_share"]
                .iter()
                .all(|k| row[k].as_f64().unwrap() > 0.0),
            "{row}"
        );
    }
    let svg = std::fs::read_to_string(plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("tokens per call") && svg.contains("fp8-block"), "{svg}");
}

#[test]
fn doctor_reports_in_json() {
    let report: Value = serde_json::from_str(&stdout(&run(&["doctor", "--json"]))).unwrap();
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert!(report["cores"].as_u64().unwrap() >= 1);
    assert!(report["read_gbps_one_thread"].as_f64().unwrap() > 0.0);
    let kernels = report["gpu"]["cuda_kernels"].as_bool().unwrap();
    let missed = report["advice"].as_array().unwrap().iter().any(|a| a.as_str().unwrap().contains("no CUDA kernels"));
    assert_eq!(kernels, !missed);
    assert_eq!(kernels, !report["gpu"]["architectures"].as_array().unwrap().is_empty());
    assert!(cfg!(feature = "cuda") || !kernels);
}

#[test]
fn rounded_activations_are_asked_for_by_name_and_told() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/16_gpt_oss_mxfp4");
    let (input, expected) = (format!("{folder}/input.safetensors"), format!("{folder}/expected.safetensors"));
    let output = tempfile::NamedTempFile::new().unwrap();
    let to = output.path().to_str().unwrap();
    let common = ["run", "--model", folder, "--input", &input, "--output", to, "--expected", &expected, "--json"];
    let answer = |more: &[&str]| -> Value {
        serde_json::from_str(&stdout(&run(&[&common[..], more].concat()))).unwrap_or_else(|e| panic!("{e}"))
    };
    let (exact, rounded) = (answer(&[]), answer(&["--backend", "cpu_simd_a8"]));
    assert_eq!((&exact["backend"], &exact["numerics"]), (&"cpu_simd".into(), &"activations exact".into()));
    assert_eq!(rounded["numerics"], "activations rounded to int8 per 32 values");
    let error = |a: &Value| a["relative_errors"]["output"].as_f64().unwrap();
    assert!(error(&exact) < 1e-5 && (1e-3..2e-2).contains(&error(&rounded)), "{exact} {rounded}");
    assert_eq!(answer(&["--fast-accum"])["fast_accum"], false);
    let text = stdout(&run(&[&common[..common.len() - 1], &["--fast-accum"]].concat()));
    assert!(text.contains("--fast-accum changes nothing"), "{text}");
    let both = run(&[&common[..], &["--backend", "cpu_simd_a8", "--exact-activations"]].concat());
    assert!(sentence(&both).contains("`cpu_simd_a8` rounds activations"));
}
