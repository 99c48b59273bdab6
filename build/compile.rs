//! One fatbin per kernel of the table, in parallel, each only when something that it depends on changed.

use crate::arch::{self, Arch, Levels};
use crate::sources;
use crate::toolkit::Toolkit;
use moe_oracle_table::{Kernel, Specialisation};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

/// The folder of the sources.
pub const KERNELS: &str = "kernels";
/// Read by nvcc itself.
pub const VARIABLES: [&str; 3] = ["NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"];
const FLAGS: [&str; 8] =
    ["-O3", "--std=c++17", "-fatbin", "-Xfatbin", "-compress-all", "--compress-mode=size", "-Xptxas", "-v"];

/// A compiled kernel.
pub struct Fatbin {
    /// The table's name of it.
    pub name: String,
    /// Its image, a file in the folder given to [`all`].
    pub file: String,
    /// The architectures in it.
    pub archs: Vec<String>,
    /// What ptxas reported.
    pub report: String,
}

struct Job<'a> {
    name: &'a str,
    source: &'a str,
    arguments: Vec<String>,
    archs: Vec<String>,
    file: String,
}

/// Compiles the kernels into `out`; an error holds nvcc's own words.
pub fn all(toolkit: &Toolkit, archs: &[Arch], kernels: &[Specialisation], out: &Path) -> Result<Vec<Fatbin>, String> {
    fs::create_dir_all(out).map_err(|e| format!("{} can't be made: {e}", out.display()))?;
    let jobs = kernels.iter().filter_map(|k| {
        let its = &k.kernel.archs;
        let archs: Vec<&Arch> = archs.iter().filter(|a| its.is_empty() || its.contains(&a.name())).collect();
        (!archs.is_empty()).then(|| job(toolkit, arch::distinct(&archs, levels_of(k.kernel)), k))
    });
    let jobs = jobs.collect::<Result<Vec<_>, _>>()?;
    remove_stale(out, &jobs);
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..workers().min(jobs.len()) {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = compile(toolkit, job, out);
                    done.lock().unwrap_or_else(|p| p.into_inner()).push(result);
                }
            });
        }
    });
    let done = done.into_inner().unwrap_or_else(|p| p.into_inner());
    let (built, failed): (Vec<_>, Vec<_>) = done.into_iter().partition(Result::is_ok);
    let failed: Vec<String> = failed.into_iter().filter_map(Result::err).collect();
    if !failed.is_empty() {
        return Err(failed.join("\n"));
    }
    let mut built: Vec<Fatbin> = built.into_iter().flatten().collect();
    built.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(built)
}

fn workers() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(cpus);
    jobs.clamp(1, cpus)
}

fn levels_of(kernel: &Kernel) -> Levels<'_> {
    if kernel.archs.is_empty() { Levels::Shared(&kernel.own_ptx) } else { Levels::OfChip }
}

fn job<'a>(toolkit: &Toolkit, archs: Vec<&Arch>, one: &'a Specialisation) -> Result<Job<'a>, String> {
    let mut arguments: Vec<String> = FLAGS.map(String::from).into();
    let file = &one.kernel.file;
    arguments.extend(arch::flags(&archs, levels_of(one.kernel)));
    arguments.push(format!("-I{KERNELS}"));
    arguments.extend(toolkit.includes().iter().map(|p| format!("-I{}", p.display())));
    arguments.extend(one.define.iter().map(|d| format!("-D{d}")));
    arguments.push(format!("{KERNELS}/{file}"));

    let mut hasher = DefaultHasher::new();
    sources::closure(Path::new(KERNELS), Path::new(file))?.hash(&mut hasher);
    (&arguments, &toolkit.build, VARIABLES.map(env::var_os)).hash(&mut hasher);
    Ok(Job {
        name: &one.name,
        source: file,
        arguments,
        archs: archs.iter().map(|a| a.name()).collect(),
        file: format!("{}-{:016x}.fatbin", one.name, hasher.finish()),
    })
}

/// The report lies beside the image, and is written last: where it is, the image is whole.
fn report_of(out: &Path, file: &str) -> PathBuf {
    out.join(file).with_extension("ptxas")
}

fn compile(toolkit: &Toolkit, job: &Job, out: &Path) -> Result<Fatbin, String> {
    let report_file = report_of(out, &job.file);
    let fatbin = |report| Fatbin { name: job.name.into(), file: job.file.clone(), archs: job.archs.clone(), report };
    if let Ok(report) = fs::read_to_string(&report_file) {
        return Ok(fatbin(report));
    }
    let run = Command::new(&toolkit.nvcc).args(&job.arguments).arg("-o").arg(out.join(&job.file)).output();
    let run = run.map_err(|e| format!("{} can't be run: {e}", toolkit.nvcc.display()))?;
    let report = String::from_utf8_lossy(&run.stdout) + String::from_utf8_lossy(&run.stderr);
    if !run.status.success() {
        let Job { name, source, .. } = job;
        return Err(format!("kernel `{name}` ({KERNELS}/{source}) does not compile ({}):\n{report}", run.status));
    }
    fs::write(&report_file, &*report).map_err(|e| format!("{} can't be written: {e}", report_file.display()))?;
    Ok(fatbin(report.into_owned()))
}

/// What earlier states of the sources left. A file that stays costs disk only, hence no error.
fn remove_stale(out: &Path, jobs: &[Job]) {
    let wanted: Vec<_> = jobs.iter().flat_map(|j| [out.join(&j.file), report_of(out, &j.file)]).collect();
    for entry in fs::read_dir(out).into_iter().flatten().flatten() {
        if !wanted.contains(&entry.path()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
