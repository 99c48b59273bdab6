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

    /// The level of the PTX that its code is made of.
    fn source(&self, levels: Levels) -> String {
        let Self { number, suffix, ptx } = self;
        let Levels::Shared(own) = levels else { return format!("{number}{suffix}") };
        match number {
            _ if *ptx || *suffix == "f" => return format!("{number}{suffix}"),
            120.. if own.contains(&120) => "120",
            90.. => "90",
            89 if own.contains(&89) => "89",
            _ => "80",
        }
        .into()
    }

    /// Whether chips of 8.9 are all that it is for.
    fn is_ada(&self) -> bool {
        self.number == 89 && !self.ptx
    }
}

/// The levels at which a kernel's code differs.
#[derive(Clone, Copy, Debug)]
pub enum Levels<'a> {
    /// 80, 90 and those of the list, 89 and 120: chips between two of them run what is made for the lower one.
    Shared(&'a [u16]),
    /// It has instructions of one chip.
    OfChip,
}

/// Those of the list whose code is not another one's anyway: 8.9 runs that of 8.0, but where it has its own.
pub fn distinct<'a>(archs: &[&'a Arch], levels: Levels) -> Vec<&'a Arch> {
    let older = archs.iter().any(|a| (80..89).contains(&a.number));
    let shared = matches!(levels, Levels::Shared(own) if !own.contains(&89));
    archs.iter().filter(|a| !(older && shared && a.is_ada())).copied().collect()
}

/// nvcc's options. Chips share the PTX of the oldest one whose instructions all of them have: making it takes more time
/// than assembling it.
pub fn flags(archs: &[&Arch], levels: Levels) -> Vec<String> {
    let mut sources: Vec<(String, Vec<String>)> = Vec::new();
    for arch in archs {
        let Arch { number, suffix, ptx } = arch;
        let source = arch.source(levels);
        let mut images = vec![format!("sm_{number}{suffix}")];
        images.extend(ptx.then(|| format!("compute_{number}")));
        match sources.iter_mut().find(|(s, _)| *s == source) {
            Some((_, all)) => all.extend(images),
            None => sources.push((source, images)),
        }
    }
    let option = |(source, images): (String, Vec<String>)| {
        ["-gencode".into(), format!("arch=compute_{source},code=[{}]", images.join(","))]
    };
    sources.into_iter().flat_map(option).collect()
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
