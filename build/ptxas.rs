//! What `ptxas -v` says of each kernel.

/// One kernel on one architecture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// The entry's name.
    pub kernel: String,
    /// `90a`
    pub arch: String,
    /// Per thread.
    pub registers: u32,
    /// Stack frame per thread, of the entry and of what it calls.
    pub stack_bytes: u32,
    /// Spill stores and loads per thread, of the entry and of what it calls.
    pub spill_bytes: u32,
    /// Static shared memory per block.
    pub shared_bytes: u32,
}

/// Reads the whole report.
pub fn parse(report: &str) -> Vec<Resources> {
    let mut all: Vec<Resources> = Vec::new();
    for line in report.lines() {
        if let Some(rest) = line.split_once("Compiling entry function '").map(|l| l.1) {
            let mut quoted = rest.split('\'');
            let kernel = quoted.next().unwrap_or_default().to_string();
            let arch = quoted.nth(1).unwrap_or_default().trim_start_matches("sm_").to_string();
            all.push(Resources { kernel, arch, ..Resources::default() });
            continue;
        }
        let Some(last) = all.last_mut() else { continue };
        let number = |unit| before(line, unit).unwrap_or(0);
        if line.contains("bytes stack frame") {
            last.stack_bytes += number("bytes stack frame");
            last.spill_bytes += number("bytes spill stores") + number("bytes spill loads");
        } else if line.contains("Used ") && line.contains(" registers") {
            last.registers = number("registers");
            last.shared_bytes = number("bytes smem");
        }
    }
    all
}

/// 40 from `... 40 UNIT ...`.
fn before(line: &str, unit: &str) -> Option<u32> {
    let head = &line[..line.find(unit)?];
    head.split_whitespace().next_back()?.parse().ok()
}
