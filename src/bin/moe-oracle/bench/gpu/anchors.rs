//! What peers reach on a GPU, from a file.

use crate::failure::{Failure, Outcome};
use serde::Deserialize;
use std::path::Path;

/// The file: measured layers of other projects, and the limits of the GPU that ran them.
#[derive(Debug, Deserialize)]
pub struct Anchors {
    /// The GPU's name, and more behind it.
    pub gpu: String,
    /// What it can do at best.
    pub limits: Limits,
    layers: Vec<Layer>,
}

/// Measured limits; any of them may be missing.
#[derive(Debug, Deserialize)]
pub struct Limits {
    /// Bytes per nanosecond read from memory.
    #[serde(rename = "hbm_read_GBps")]
    pub read_gbps: Option<f64>,
    /// 10^12 operations per second in bf16.
    #[serde(rename = "bf16_TFLOPs")]
    pub bf16_tflops: Option<f64>,
    /// 10^12 operations per second in fp8, which int8 does not fall short of.
    #[serde(rename = "fp8_TFLOPs")]
    pub fp8_tflops: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct Layer {
    preset: String,
    scheme: String,
    peer: String,
    tokens: usize,
    us: f64,
    floor_us: Option<f64>,
}

/// The fastest peer of a cell.
#[derive(Debug, PartialEq)]
pub struct Peer<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its time of a call.
    pub us: f64,
    /// That over the floor for the experts that its own routing hit, which may be others than here.
    pub ratio: Option<f64>,
}

fn usable(x: f64) -> bool {
    x.is_finite() && x > 0.0
}

impl Anchors {
    /// Reads the file.
    pub fn read(path: &Path) -> Outcome<Self> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|e| Failure::said(format_args!("{} can't be read: {e}", path.display())))?;
        Self::parse(&text).map_err(|e| Failure::said(format_args!("{}: {e}", path.display())))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let anchors: Self = serde_json::from_str(text).map_err(|e| format!("not a file of anchors: {e}"))?;
        let numbers = anchors
            .layers
            .iter()
            .flat_map(|l| [l.us].into_iter().chain(l.floor_us))
            .chain(anchors.limits.read_gbps)
            .chain(anchors.limits.bf16_tflops)
            .chain(anchors.limits.fp8_tflops);
        match numbers.into_iter().find(|n| !usable(*n)) {
            Some(n) => Err(format!("a time or limit of {n} makes no sense")),
            None => Ok(anchors),
        }
    }

    /// Whether the file is about the GPU of this name, which may be the beginning of another's: NVIDIA H200 NVL.
    pub fn are_of(&self, gpu: &str) -> bool {
        self.gpu
            .strip_prefix(gpu)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([',', ';']) || rest.starts_with(" ("))
    }

    /// The fastest peer with this very layer, weight format and number of tokens. Formats with quantised activations have
    /// names of their own (`mxfp4-a8`) and are no peers of the plain one.
    pub fn best(&self, preset: &str, scheme: &str, tokens: usize) -> Option<Peer<'_>> {
        let same = self.layers.iter().filter(|l| l.preset == preset && l.scheme == scheme && l.tokens == tokens);
        let best = same.min_by(|a, b| a.us.total_cmp(&b.us));
        best.map(|l| Peer { name: &l.peer, us: l.us, ratio: l.floor_us.map(|floor| l.us / floor) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anchors(us: &str) -> Result<Anchors, String> {
        let row = |peer, scheme, tokens, us: &str| {
            format!(
                r#"{{"preset":"a","peer":"{peer}","scheme":"{scheme}","tokens":{tokens},"us":{us},"floor_us":13.5,"more":[]}}"#
            )
        };
        let rows = [
            row("slow", "mxfp4", 4, "30.5"),
            row("fast", "mxfp4", 4, us),
            row("other", "mxfp4-a8", 4, "9"),
            row("fewer", "mxfp4", 1, "8"),
        ];
        let limits = r#"{"hbm_read_GBps": 4574, "fp8_TFLOPs": 1}"#;
        Anchors::parse(&format!(
            r#"{{"gpu":"NVIDIA H200 (sm_90a, 132 SMs)","limits":{limits},"layers":[{}]}}"#,
            rows.join(",")
        ))
    }

    #[test]
    fn the_best_peer_is_the_fastest_of_the_very_cell() {
        let a = anchors("20.25").unwrap();
        assert_eq!(a.best("a", "mxfp4", 4), Some(Peer { name: "fast", us: 20.25, ratio: Some(1.5) }));
        assert_eq!(a.best("a", "mxfp4", 1).map(|p| p.name), Some("fewer"));
        assert_eq!(a.best("a", "mxfp4-a8", 4).map(|p| p.name), Some("other"));
        for (preset, scheme, tokens) in [("b", "mxfp4", 4), ("a", "mxfp", 4), ("a", "mxfp4", 2)] {
            assert_eq!(a.best(preset, scheme, tokens), None, "{preset} {scheme} {tokens}");
        }
        assert_eq!((a.limits.read_gbps, a.limits.bf16_tflops), (Some(4574.0), None));
    }

    #[test]
    fn times_of_zero_and_files_of_something_else_are_refused() {
        assert!(anchors("0").unwrap_err().contains("makes no sense"));
        assert!(anchors("\"fast\"").unwrap_err().contains("not a file of anchors"));
        assert!(Anchors::parse("[]").is_err());
    }

    #[test]
    fn a_gpu_of_a_longer_name_is_another() {
        let mut a = anchors("1").unwrap();
        assert!(a.are_of("NVIDIA H200") && !a.are_of("NVIDIA H100") && !a.are_of("NVIDIA H200 NVL"));
        a.gpu = "NVIDIA H200 NVL".into();
        assert!(!a.are_of("NVIDIA H200") && a.are_of("NVIDIA H200 NVL"));
    }
}
