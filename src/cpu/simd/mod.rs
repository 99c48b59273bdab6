//! placeholder until the backend lands
#![allow(missing_docs)]
use super::*;
use crate::{config::Activation, platform::CpuIsa, weights::MoeWeights};
#[derive(Debug, thiserror::Error)]
#[error("no")]
pub struct PackError;
pub struct SimdExperts;
impl SimdExperts {
    pub fn new(_: &MoeWeights, _: Activation, _: CpuIsa) -> Result<Self, PackError> {
        Err(PackError)
    }
}
impl Experts for SimdExperts {
    fn scratch_len(&self, _: usize) -> usize {
        0
    }
    fn run(&self, _: ExpertsCall<'_>, _: &mut [f32], _: &mut [f32], _: &dyn Executor) {}
    fn bytes_per_expert(&self) -> usize {
        0
    }
    fn experts(&self) -> usize {
        0
    }
    fn isa(&self) -> CpuIsa {
        CpuIsa::Portable
    }
}
