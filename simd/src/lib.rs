//! The vectorised kernels of moe-oracle, a crate of their own because they take longer to compile than everything else: a
//! change elsewhere, or another set of features, leaves them as they are. No stable interface: what of it is public there,
//! moe-oracle re-exports.
//!
//! See [`format`] for the layout of packed weights, `float` for the loop and [`kernel`] for its entry points, for which callers
//! ask by instruction set and [`format::Shape`]. With 4-bit weights products are integer ones, activations being brought into a
//! fixed-point form that is as good as exact: see [`fixed`] for the form and `nibble` for the loop; so are those of int8
//! weights where there is VNNI, see `dot`. E4m3 weights take activations multiplied by a power of two: see [`scaled`].
//!
//! Where there are dot products of bfloat16, rows that are such in every value meet bf16, fp8 and 4-bit weights as such,
//! exactly: see [`pairs`] and `pair_dot`. The [`Rounding`]s to int8 have the form of `int8` and the loop of `dot`.
#![warn(missing_docs)]

mod activation;
mod detect;
mod dot;
pub mod fixed;
mod float;
pub mod format;
mod int8;
mod isa;
pub mod kernel;
pub mod math;
mod nibble;
pub mod number;
#[cfg(target_arch = "x86_64")]
mod pair_dot;
#[cfg(target_arch = "x86_64")]
mod pair_format;
pub mod pairs;
mod rounding;
pub mod scaled;
mod slab;

pub use activation::{Activation, sigmoid};
pub use detect::CpuIsa;
pub use rounding::Rounding;
