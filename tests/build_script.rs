//! The pieces of the build script that read what others wrote.

#[allow(dead_code)]
#[path = "../build/arch.rs"]
mod arch;
#[path = "../build/ptxas.rs"]
mod ptxas;
#[path = "../build/sources.rs"]
mod sources;

use arch::Levels;
use std::path::Path;

#[test]
fn architectures_become_options_of_nvcc() {
    let archs = arch::parse_list("80, 90a;100f 90a,89+ptx").unwrap();
    assert_eq!(archs.iter().map(arch::Arch::name).collect::<Vec<_>>(), ["80", "90a", "100f", "89+ptx"]);
    let flags = |list: &str, levels| {
        let archs = arch::parse_list(list).unwrap();
        arch::flags(&arch::distinct(&archs.iter().collect::<Vec<_>>(), levels), levels).join(" ")
    };
    assert_eq!(
        flags("80, 90a;100f 90a,89+ptx", Levels::Shared(&[])),
        "-gencode arch=compute_80,code=[sm_80] -gencode arch=compute_90,code=[sm_90a] \
         -gencode arch=compute_100f,code=[sm_100f] -gencode arch=compute_89,code=[sm_89,compute_89]"
    );
    let old = "-gencode arch=compute_80,code=[sm_80]";
    let ada = "-gencode arch=compute_89,code=[sm_89]";
    let shared = "-gencode arch=compute_90,code=[sm_90a,sm_100a,sm_120a]";
    let apart = "-gencode arch=compute_90,code=[sm_90a,sm_100a] -gencode arch=compute_120,code=[sm_120a]";
    assert_eq!(flags(arch::DEFAULT, Levels::Shared(&[])), format!("{old} {shared}"));
    assert_eq!(flags(arch::DEFAULT, Levels::Shared(&[89])), format!("{old} {ada} {shared}"));
    assert_eq!(flags(arch::DEFAULT, Levels::Shared(&[89, 120])), format!("{old} {ada} {apart}"));
    assert_eq!(flags("89", Levels::Shared(&[])), "-gencode arch=compute_80,code=[sm_89]");
    assert_eq!(flags("120a", Levels::Shared(&[])), "-gencode arch=compute_90,code=[sm_120a]");
    assert_eq!(flags("90a", Levels::OfChip), "-gencode arch=compute_90a,code=[sm_90a]");
    assert!(arch::parse_list(arch::DEFAULT).is_ok());
    for bad in ["", " ,", "sm_90", "90b", "75", "90a+ptx", "a", "+90", "99999999", "8.0"] {
        let error = arch::parse_list(bad).unwrap_err();
        assert!(error.starts_with("MOE_ORACLE_CUDA_ARCHS"), "{bad}: {error}");
    }
}

#[test]
fn the_assemblers_report_is_read_per_kernel_and_architecture() {
    let report = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 120 registers, used 1 barriers, 4096 bytes smem, 416 bytes cmem[0]
ptxas info    : Compile time = 6.304 ms
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for callee
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for one
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 24 bytes cumulative stack size
";
    let all = ptxas::parse(report);
    let row = |arch: &str, registers, stack_bytes, spill_bytes, shared_bytes| ptxas::Resources {
        kernel: "one".into(),
        arch: arch.into(),
        registers,
        stack_bytes,
        spill_bytes,
        shared_bytes,
    };
    assert_eq!(all, [row("80", 120, 0, 0, 4096), row("90a", 64, 24, 20, 0)]);
    assert!(ptxas::parse("warning: nothing of the kind\n").is_empty());
}

#[test]
fn a_kernel_depends_on_what_it_includes_and_on_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("a.cu", "#include \"common/x.cuh\"\n  #  include <common/y.cuh>\n#include <cuda_bf16.h>\n");
    write("common/x.cuh", "#include \"y.cuh\"\n#include \"../top.cuh\"\n");
    write("common/y.cuh", "#include \"x.cuh\"\n#pragma once\n");
    write("top.cuh", "#include\n#include \"");
    write("b.cu", "int other;\n");
    let all = sources::closure(folder.path(), Path::new("a.cu")).unwrap();
    let names: Vec<_> = all.keys().map(|p| p.strip_prefix(folder.path()).unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["a.cu", "common/x.cuh", "common/y.cuh", "top.cuh"]);
    assert!(sources::closure(folder.path(), Path::new("missing.cu")).unwrap_err().contains("missing.cu"));
}
