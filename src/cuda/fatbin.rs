//! The kernels of this build, as build.rs left them.

/// The compiled kernels of one name in the table.
#[derive(Debug)]
pub struct Fatbin {
    /// As the table names it.
    pub name: &'static str,
    /// Architectures inside: `90`, `90a` (that chip only), `100f` (its family), `80+ptx` (and PTX for later chips).
    pub archs: &'static [&'static str],
    /// What the driver loads.
    pub image: &'static [u8],
    /// What the assembler said of each kernel on each architecture.
    pub resources: &'static [Resources],
}

/// One kernel on one architecture.
#[derive(Debug)]
pub struct Resources {
    /// The entry's name.
    pub kernel: &'static str,
    /// `90a`
    pub arch: &'static str,
    /// Per thread.
    pub registers: u32,
    /// Stack frame per thread.
    pub stack_bytes: u32,
    /// Bytes spilled and reloaded per thread.
    pub spill_bytes: u32,
    /// Static shared memory per block.
    pub shared_bytes: u32,
}

/// Images start where the driver may read them in words.
#[allow(dead_code)] // In a build without kernels.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

#[allow(unused_macros)] // In a build without kernels.
macro_rules! image {
    ($path:literal) => {{
        static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), $path)));
        &IMAGE.0
    }};
}

// NOT_BUILT: why there are no kernels, if so. TOOLKIT: the CUDA version that compiled them. FATBINS: the kernels.
mod generated {
    #![allow(missing_docs, unused_imports)]
    use super::{Aligned, Fatbin, Resources};
    include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
}
pub use generated::{FATBINS, NOT_BUILT, TOOLKIT};

/// The smallest CUDA version of a driver that this build works with, 12080 for 12.8.
///
/// A driver loads the code of its own major version's toolkits, whatever their minor version; 12.8 is the first that
/// has every function that we call.
pub const fn driver_needed() -> i32 {
    let of_kernels = TOOLKIT.0 as i32 * 1000;
    if of_kernels > 12080 { of_kernels } else { 12080 }
}

impl Fatbin {
    /// Whether some image inside runs on this compute capability (90 for 9.0).
    pub fn runs_on(&self, capability: u16) -> bool {
        self.archs.iter().any(|arch| arch_runs_on(arch, capability))
    }
}

fn arch_runs_on(arch: &str, capability: u16) -> bool {
    let number = |text: &str| text.parse::<u16>().ok();
    if let Some(exact) = arch.strip_suffix('a') {
        return number(exact) == Some(capability);
    }
    let (text, ptx) = arch.strip_suffix("+ptx").map_or((arch, false), |t| (t, true));
    // Code runs on its own and later chips of one major version; PTX on every later chip.
    number(text.trim_end_matches('f')).is_some_and(|n| capability >= n && (ptx || capability / 10 == n / 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_where_nvidia_says_that_it_does() {
        for (arch, runs, does_not) in [
            ("80", &[80, 86, 87, 89][..], &[75, 90, 100][..]),
            ("89", &[89], &[80, 86, 90]),
            ("90a", &[90], &[100, 89, 120]),
            ("100a", &[100], &[103, 110]),
            ("100f", &[100, 103], &[90, 110, 120]),
            ("120f", &[120, 121], &[100]),
            ("80+ptx", &[80, 90, 120, 130], &[75]),
            ("odd", &[], &[80, 90]),
        ] {
            assert!(runs.iter().all(|c| arch_runs_on(arch, *c)), "{arch}");
            assert!(!does_not.iter().any(|c| arch_runs_on(arch, *c)), "{arch}");
        }
    }

    /// A spill is a kernel that runs at the speed of local memory; nobody would see it in a result.
    #[test]
    fn no_kernel_spills() {
        if let Some(why) = NOT_BUILT {
            return println!("skipped: no kernels in this build: {why}");
        }
        assert!(!FATBINS.is_empty());
        for f in FATBINS {
            assert!(!f.resources.is_empty(), "{}: the assembler reported nothing", f.name);
            for r in f.resources {
                assert_eq!((r.stack_bytes, r.spill_bytes), (0, 0), "{} on {} in {}", r.kernel, r.arch, f.name);
                assert!(r.registers > 0, "{} on {}", r.kernel, r.arch);
            }
        }
    }

    #[test]
    fn images_are_fatbins_at_aligned_addresses() {
        for f in FATBINS {
            assert_eq!(f.image.as_ptr() as usize % 64, 0, "{}", f.name);
            assert_eq!(f.image[..4], 0xBA55_ED50_u32.to_le_bytes(), "{}", f.name);
        }
    }
}
