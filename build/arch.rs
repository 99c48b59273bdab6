//! The GPU architectures that kernels are compiled for.

/// What is built when `MOE_ORACLE_CUDA_ARCHS` does not say otherwise: Ampere, Ada, Hopper and both Blackwells.
pub const DEFAULT: &str = "80,89,90a,100a,120a";

/// One architecture: `80`, `90a` (that chip only), `100f` (its family), `80+ptx` (with PTX for later chips).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arch {
    /// 90
    pub number: u16,
    /// "", "a" or "f"
    suffix: &'static str,
    ptx: bool,
}

impl Arch {
    /// Reads one entry.
    fn parse(text: &str) -> Option<Self> {
        let (text, ptx) = text.strip_suffix("+ptx").map_or((text, false), |t| (t, true));
        let (digits, suffix) = match text.strip_suffix(['a', 'f']) {
            Some(digits) if text.ends_with('a') => (digits, "a"),
            Some(digits) => (digits, "f"),
            None => (text, ""),
        };
        // PTX of one chip or family is of no use to later ones.
        let sensible = digits.bytes().all(|b| b.is_ascii_digit()) && (suffix.is_empty() || !ptx);
        let number = digits.parse().ok().filter(|n| *n >= 80)?;
        sensible.then_some(Self { number, suffix, ptx })
    }

    /// As the generated table writes it.
    pub fn name(&self) -> String {
        format!("{}{}{}", self.number, self.suffix, if self.ptx { "+ptx" } else { "" })
    }

    /// nvcc's options.
    pub fn flags(&self) -> Vec<String> {
        let Self { number, suffix, ptx } = self;
        let code = format!("sm_{number}{suffix}");
        let code = if *ptx { format!("[{code},compute_{number}]") } else { code };
        vec!["-gencode".into(), format!("arch=compute_{number}{suffix},code={code}")]
    }
}

/// Reads the list; the error is one sentence.
pub fn parse_list(text: &str) -> Result<Vec<Arch>, String> {
    let mut archs = Vec::new();
    for entry in text.split([',', ' ', ';']).filter(|e| !e.is_empty()) {
        let arch = Arch::parse(entry).ok_or_else(|| {
            format!("MOE_ORACLE_CUDA_ARCHS: `{entry}` is no architecture from 80 up such as 80, 90a, 100f or 80+ptx")
        })?;
        if !archs.contains(&arch) {
            archs.push(arch);
        }
    }
    if archs.is_empty() { Err("MOE_ORACLE_CUDA_ARCHS names no architecture".into()) } else { Ok(archs) }
}
