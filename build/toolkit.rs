//! Finding nvcc. Nothing is downloaded.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The first toolkit whose nvcc compresses fatbins and knows every default architecture.
const OLDEST: (u32, u32) = (12, 8);

/// The variables that decide what is found, beside PATH.
pub const VARIABLES: [&str; 5] = ["NVCC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"];

/// A CUDA toolkit.
pub struct Toolkit {
    /// The compiler.
    pub nvcc: PathBuf,
    /// (13, 0)
    pub version: (u32, u32),
    /// All that `nvcc --version` says: another build of the compiler means other code.
    pub build: String,
}

/// Why there is none.
pub enum Missing {
    /// The build goes on without kernels.
    Absent(String),
    /// What the user asked for by name does not work.
    Broken(String),
}

/// Looks in NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, then in the Python wheels of the active environment.
pub fn find() -> Result<Toolkit, Missing> {
    if let Some(nvcc) = env::var_os("NVCC").filter(|v| !v.is_empty()) {
        return open(nvcc.into()).map_err(|e| Missing::Broken(format!("NVCC is set, but {e}")));
    }
    let nvcc = toolkits().chain(wheels()).find(|p| p.is_file()).ok_or_else(|| {
        Missing::Absent(
            "nvcc was not found in NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda or the active Python environment"
                .into(),
        )
    })?;
    open(nvcc).map_err(Missing::Absent)
}

fn executable() -> String {
    format!("nvcc{}", env::consts::EXE_SUFFIX)
}

fn toolkits() -> impl Iterator<Item = PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let path: Vec<_> = env::split_paths(&path).collect();
    homes.chain(path).chain(["/usr/local/cuda/bin".into()]).map(|folder| folder.join(executable()))
}

/// The wheels `nvidia-cuda-nvcc` and its companions put a toolkit into site-packages/nvidia/cu13.
fn wheels() -> impl Iterator<Item = PathBuf> {
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let mut packages: Vec<PathBuf> = active.flat_map(|prefix| site_packages(&prefix)).collect();
    if packages.is_empty() {
        packages.extend(site_packages_of_python3());
    }
    packages.into_iter().flat_map(|p| folders(&p.join("nvidia"))).map(|p| p.join("bin").join(executable()))
}

fn site_packages(prefix: &Path) -> Vec<PathBuf> {
    let unix = folders(&prefix.join("lib")).into_iter().map(|python| python.join("site-packages"));
    unix.chain([prefix.join("Lib").join("site-packages")]).filter(|p| p.is_dir()).collect()
}

fn site_packages_of_python3() -> Option<PathBuf> {
    let say = "import sysconfig; print(sysconfig.get_paths()['purelib'])";
    let out = Command::new("python3").args(["-c", say]).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8(out.stdout).ok()?.trim().into())
}

fn folders(parent: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let mut folders: Vec<_> = entries.map(|e| e.path()).filter(|p| p.is_dir()).collect();
    folders.sort();
    folders
}

fn open(nvcc: PathBuf) -> Result<Toolkit, String> {
    let shown = nvcc.display();
    let out = Command::new(&nvcc).arg("--version").output().map_err(|e| format!("{shown} can't be run: {e}"))?;
    let build = String::from_utf8_lossy(&out.stdout).into_owned();
    let version = release(&build).ok_or_else(|| format!("{shown} --version names no release"))?;
    if version < OLDEST {
        let ((a, b), (c, d)) = (version, OLDEST);
        return Err(format!("{shown} is of CUDA {a}.{b}, and the kernels need {c}.{d} or later"));
    }
    Ok(Toolkit { nvcc, version, build })
}

/// (13, 0) from `... release 13.0, V13.0.88 ...`.
fn release(text: &str) -> Option<(u32, u32)> {
    let (major, rest) = text.split_once("release ")?.1.split_once('.')?;
    Some((major.parse().ok()?, rest.split_once(',')?.0.parse().ok()?))
}

impl Toolkit {
    /// The toolkit's headers; nvcc finds its own, and the wheels' library headers lie where it does not look.
    pub fn includes(&self) -> Vec<PathBuf> {
        let real = self.nvcc.canonicalize().unwrap_or_else(|_| self.nvcc.clone());
        let Some(root) = real.parent().and_then(Path::parent) else { return Vec::new() };
        let include = root.join("include");
        [include.join("cccl"), include].into_iter().filter(|p| p.is_dir()).collect()
    }
}
