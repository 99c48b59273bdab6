//! CPU backends: the plain reference and the vectorised one.

mod experts;
mod pool;
mod quantize;
pub mod reference;
pub mod simd;

pub use experts::{Assignment, Experts, ExpertsCall, ROW_ALIGN, Segment, padded};
pub use pool::{Executor, SingleThread, ThreadPool};
pub use quantize::quantize_row;
