//! What activations are rounded to.

/// What the input of each GEMM (hidden states, and what the activation function gives) is rounded to.
///
/// With int8, a block of values x becomes s * q, where s is the block's largest magnitude over 127 and q the nearest
/// integer: each x is off by at most s / 2, which is 1/254 of that largest magnitude. An output of a GEMM (before its
/// bias) is therefore off by at most the sum over blocks of s / 2 times the sum of the block's absolute weights, beside
/// float32 rounding. The errors of single values are as good as independent, so that what is seen is far smaller: for
/// normally distributed values about 0.6 % of the output's norm a GEMM with blocks of 32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// Nothing: they stay float32.
    #[default]
    None,
    /// int8 per block of 32 consecutive columns (in their packed order), cut anew in every group of the weights.
    Int8Block,
    /// int8 per row, as the keys `INT8_DYNAMIC_TOKEN_SYM` and `INT8_DYNAMIC_TENSOR_SYM` (taken per token) say.
    Int8Row,
}
