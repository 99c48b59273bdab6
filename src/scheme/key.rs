//! Quantisation keys: what a weight or activation tensor's numbers are, as one small value.
//!
//! A [`QuantKey`] names the element type, how its scales are laid out, and whether the grid is symmetric. It is
//! readable as a struct and travels through const generics as a `u64` ([`QuantKey::bits`]), because stable Rust
//! admits only integers there. The bits print in hex as fields: version, scale2 columns, scale2 rows, scale columns,
//! scale rows, scale types, flags, element.

/// The stored element of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Elem {
    /// 1 sign, 4 exponent, 3 mantissa bits; no infinity; largest 448 (OCP e4m3fn).
    E4m3 = 1,
    /// 1 sign, 5 exponent, 2 mantissa bits; largest 57344.
    E5m2 = 2,
    /// 4-bit float, two per byte, low nibble first; magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6.
    E2m1 = 3,
    /// Two's complement, 8 bits.
    Int8 = 4,
    /// Unsigned 4 bits, two per byte, low nibble first; value = code - zero point (8 where symmetric).
    U4 = 5,
    /// Unsigned 8 bits; value = code - zero point (128 where symmetric).
    U8 = 6,
    /// 6-bit float with 3 exponent and 2 mantissa bits; only ever asked for activations.
    E3m2 = 7,
    /// 6-bit float with 2 exponent and 3 mantissa bits; only ever asked for activations.
    E2m3 = 8,
}

/// The number type of a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ScaleType {
    /// float32
    F32 = 1,
    /// bf16 or f16, whichever the checkpoint has
    Half = 2,
    /// A power of two, `2^(code - 127)`; code 255 is NaN.
    E8m0 = 3,
    /// e4m3fn
    E4m3 = 4,
}

/// How far one scale reaches along one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Extent {
    /// The whole dimension.
    All,
    /// A group size that the checkpoint chooses (the whole row included).
    Any,
    /// This many elements; a power of two.
    Len(u32),
}

impl Extent {
    const fn bits(self) -> u64 {
        match self {
            Extent::All => 0,
            Extent::Any => 0xff,
            Extent::Len(n) => {
                assert!(n.is_power_of_two(), "a scale's group length is a power of two");
                n.trailing_zeros() as u64 + 1
            }
        }
    }

    const fn from_bits(bits: u64) -> Option<Extent> {
        match bits & 0xff {
            0 => Some(Extent::All),
            0xff => Some(Extent::Any),
            n if n <= 31 => Some(Extent::Len(1 << (n - 1))),
            _ => None,
        }
    }
}

/// The shape of the block that shares one scale: rows (output channels, or tokens) by columns (along K).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupShape {
    /// Along N (weights) or tokens (activations).
    pub rows: Extent,
    /// Along K.
    pub cols: Extent,
}

impl GroupShape {
    /// One scale for the tensor.
    pub const PER_TENSOR: Self = Self { rows: Extent::All, cols: Extent::All };
    /// One scale per row: per output channel of a weight, per token of an activation.
    pub const PER_ROW: Self = Self { rows: Extent::Len(1), cols: Extent::All };

    /// `rows` x `cols` elements share a scale.
    pub const fn block(rows: u32, cols: u32) -> Self {
        Self { rows: Extent::Len(rows), cols: Extent::Len(cols) }
    }
}

/// One level of scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScaleDesc {
    /// Its number type.
    pub ty: ScaleType,
    /// Computed from the data at run time (activations) rather than stored.
    pub dynamic: bool,
    /// The block that shares it.
    pub group: GroupShape,
}

impl ScaleDesc {
    /// A stored scale.
    pub const fn stored(ty: ScaleType, group: GroupShape) -> Self {
        Self { ty, dynamic: false, group }
    }

    /// A scale computed at run time.
    pub const fn dynamic(ty: ScaleType, group: GroupShape) -> Self {
        Self { ty, dynamic: true, group }
    }
}

/// What a tensor's numbers are. `Option<QuantKey>::None` means: not quantised (bf16, f16 or f32).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantKey {
    /// The stored element.
    pub elem: Elem,
    /// The scales next to the elements.
    pub scale: ScaleDesc,
    /// The scales of the scales (nvfp4).
    pub scale2: Option<ScaleDesc>,
    /// No zero points.
    pub symmetric: bool,
}

/// Bumped when the meaning of [`QuantKey::bits`] changes.
const VERSION: u64 = 1;

impl QuantKey {
    const fn sym(elem: Elem, scale: ScaleDesc) -> Self {
        Self { elem, scale, scale2: None, symmetric: true }
    }

    /// The key as an integer, for const generics. Never 0: [`UNQUANTIZED`] is.
    pub const fn bits(self) -> u64 {
        let (ty2, dyn2, rows2, cols2) = match self.scale2 {
            None => (0, 0, 0, 0),
            Some(s) => (s.ty as u64, s.dynamic as u64, s.group.rows.bits(), s.group.cols.bits()),
        };
        self.elem as u64
            | (self.symmetric as u64) << 8
            | (self.scale.dynamic as u64) << 9
            | dyn2 << 10
            | (self.scale.ty as u64) << 16
            | ty2 << 20
            | self.scale.group.rows.bits() << 24
            | self.scale.group.cols.bits() << 32
            | rows2 << 40
            | cols2 << 48
            | VERSION << 56
    }

    /// The key back from [`bits`](Self::bits); `None` for 0 and for what no key encodes to.
    pub const fn from_bits(bits: u64) -> Option<Self> {
        let elem = match bits & 0xff {
            1 => Elem::E4m3,
            2 => Elem::E5m2,
            3 => Elem::E2m1,
            4 => Elem::Int8,
            5 => Elem::U4,
            6 => Elem::U8,
            7 => Elem::E3m2,
            8 => Elem::E2m3,
            _ => return None,
        };
        let (Some(rows), Some(cols)) = (Extent::from_bits(bits >> 24), Extent::from_bits(bits >> 32)) else {
            return None;
        };
        let Some(ty) = scale_type(bits >> 16) else { return None };
        let scale = ScaleDesc { ty, dynamic: bits >> 9 & 1 == 1, group: GroupShape { rows, cols } };
        let scale2 = match scale_type(bits >> 20) {
            None => None,
            Some(ty) => {
                let (Some(rows), Some(cols)) = (Extent::from_bits(bits >> 40), Extent::from_bits(bits >> 48)) else {
                    return None;
                };
                Some(ScaleDesc { ty, dynamic: bits >> 10 & 1 == 1, group: GroupShape { rows, cols } })
            }
        };
        let key = Self { elem, scale, scale2, symmetric: bits >> 8 & 1 == 1 };
        // Whatever the fields do not carry must be zero, or two integers would mean one key.
        if key.bits() == bits { Some(key) } else { None }
    }

    /// Bits of one stored element.
    pub const fn elem_bits(self) -> u32 {
        match self.elem {
            Elem::E2m1 | Elem::U4 => 4,
            Elem::E3m2 | Elem::E2m3 => 6,
            _ => 8,
        }
    }
}

const fn scale_type(bits: u64) -> Option<ScaleType> {
    match bits & 0xf {
        1 => Some(ScaleType::F32),
        2 => Some(ScaleType::Half),
        3 => Some(ScaleType::E8m0),
        4 => Some(ScaleType::E4m3),
        _ => None,
    }
}

/// The const-generic value that stands for "not quantised".
pub const UNQUANTIZED: u64 = 0;

/// The bits of an optional key.
pub const fn key_bits(key: Option<QuantKey>) -> u64 {
    match key {
        None => UNQUANTIZED,
        Some(key) => key.bits(),
    }
}

macro_rules! keys {
    ($($(#[$doc:meta])* $name:ident = $vllm:literal : $key:expr;)*) => {
        $($(#[$doc])* pub const $name: QuantKey = $key;)*

        /// Every named key with its constant's name here and in vLLM.
        pub const NAMED_KEYS: &[(&str, &str, QuantKey)] = &[$((stringify!($name), $vllm, $name)),*];
    };
}

use Elem::*;
use ScaleType::{E4m3 as SE4m3, E8m0, F32, Half};
const fn st(ty: ScaleType, group: GroupShape) -> ScaleDesc {
    ScaleDesc::stored(ty, group)
}
const fn dy(ty: ScaleType, group: GroupShape) -> ScaleDesc {
    ScaleDesc::dynamic(ty, group)
}
const TENSOR: GroupShape = GroupShape::PER_TENSOR;
const ROW: GroupShape = GroupShape::PER_ROW;
const ANY_GROUP: GroupShape = GroupShape { rows: Extent::Len(1), cols: Extent::Any };

keys! {
    /// fp8, one stored float32 scale per tensor.
    FP8_STATIC_TENSOR_SYM = "kFp8StaticTensorSym": QuantKey::sym(E4m3, st(F32, TENSOR));
    /// fp8, one scale per tensor computed at run time.
    FP8_DYNAMIC_TENSOR_SYM = "kFp8DynamicTensorSym": QuantKey::sym(E4m3, dy(F32, TENSOR));
    /// fp8, one stored float32 scale per output channel.
    FP8_STATIC_CHANNEL_SYM = "kFp8StaticChannelSym": QuantKey::sym(E4m3, st(F32, ROW));
    /// fp8, one scale per token computed at run time.
    FP8_DYNAMIC_TOKEN_SYM = "kFp8DynamicTokenSym": QuantKey::sym(E4m3, dy(F32, ROW));
    /// fp8, stored scales per 128x128 block (DeepSeek).
    FP8_STATIC_128_BLOCK_SYM = "kFp8Static128BlockSym": QuantKey::sym(E4m3, st(F32, GroupShape::block(128, 128)));
    /// fp8, stored scales per 64x64 block: a 128 block refined for a tensor-parallel shard.
    FP8_STATIC_64_BLOCK_SYM = "QuantKey(f8e4m3fn,scale(f32,static,GroupShape(row=64, col=64)),symmetric)": QuantKey::sym(E4m3, st(F32, GroupShape::block(64, 64)));
    /// fp8, stored scales per 32x32 block.
    FP8_STATIC_32_BLOCK_SYM = "QuantKey(f8e4m3fn,scale(f32,static,GroupShape(row=32, col=32)),symmetric)": QuantKey::sym(E4m3, st(F32, GroupShape::block(32, 32)));
    /// fp8, stored power-of-two scales per 128x128 block.
    FP8_STATIC_128_BLOCK_E8M0_SYM = "kFp8Static128BlockE8M0Sym": QuantKey::sym(E4m3, st(E8m0, GroupShape::block(128, 128)));
    /// fp8, scales per token and 128 columns computed at run time.
    FP8_DYNAMIC_128_SYM = "kFp8Dynamic128Sym": QuantKey::sym(E4m3, dy(F32, GroupShape::block(1, 128)));
    /// fp8, scales per token and 64 columns computed at run time.
    FP8_DYNAMIC_64_SYM = "kFp8Dynamic64Sym": QuantKey::sym(E4m3, dy(F32, GroupShape::block(1, 64)));
    /// nvfp4 weights: e4m3 scale per 16 columns, float32 per tensor.
    NVFP4_STATIC = "kNvfp4Static": QuantKey { scale2: Some(st(F32, TENSOR)), ..QuantKey::sym(E2m1, st(SE4m3, GroupShape::block(1, 16))) };
    /// nvfp4 activations: block scales at run time under a stored float32 per tensor.
    NVFP4_DYNAMIC = "kNvfp4Dynamic": QuantKey { scale2: Some(st(F32, TENSOR)), ..QuantKey::sym(E2m1, dy(SE4m3, GroupShape::block(1, 16))) };
    /// nvfp4 activations with the second scale per token at run time.
    NVFP4_DYNAMIC_TOKEN = "kNvfp4DynamicToken": QuantKey { scale2: Some(dy(F32, ROW)), ..QuantKey::sym(E2m1, dy(SE4m3, GroupShape::block(1, 16))) };
    /// mxfp4: e8m0 scale per 32 columns (OCP MX v1.0).
    MXFP4_STATIC = "kMxfp4Static": QuantKey::sym(E2m1, st(E8m0, GroupShape::block(1, 32)));
    /// mxfp4 activations.
    MXFP4_DYNAMIC = "kMxfp4Dynamic": QuantKey::sym(E2m1, dy(E8m0, GroupShape::block(1, 32)));
    /// mxfp8: e4m3 with an e8m0 scale per 32 columns (OCP MX v1.0).
    MXFP8_STATIC = "kMxfp8Static": QuantKey::sym(E4m3, st(E8m0, GroupShape::block(1, 32)));
    /// mxfp8 activations.
    MXFP8_DYNAMIC = "kMxfp8Dynamic": QuantKey::sym(E4m3, dy(E8m0, GroupShape::block(1, 32)));
    /// mxfp6 (e3m2) activations.
    MXFP6_E3M2_DYNAMIC = "kMxfp6E3M2Dynamic": QuantKey::sym(E3m2, dy(E8m0, GroupShape::block(1, 32)));
    /// mxfp6 (e2m3) activations.
    MXFP6_E2M3_DYNAMIC = "kMxfp6E2M3Dynamic": QuantKey::sym(E2m3, dy(E8m0, GroupShape::block(1, 32)));
    /// int8, one stored float32 scale per output channel.
    INT8_STATIC_CHANNEL_SYM = "kInt8StaticChannelSym": QuantKey::sym(Int8, st(F32, ROW));
    /// int8, one stored float32 scale per tensor.
    INT8_STATIC_TENSOR_SYM = "kInt8StaticTensorSym": QuantKey::sym(Int8, st(F32, TENSOR));
    /// int8, one scale per token computed at run time.
    INT8_DYNAMIC_TOKEN_SYM = "kInt8DynamicTokenSym": QuantKey::sym(Int8, dy(F32, ROW));
    /// int8, one scale per tensor computed at run time.
    INT8_DYNAMIC_TENSOR_SYM = "kInt8DynamicTensorSym": QuantKey::sym(Int8, dy(F32, TENSOR));
    /// 4-bit integers, symmetric, group size chosen by the checkpoint.
    INT4_STATIC = "kInt4Static": QuantKey::sym(U4, st(Half, ANY_GROUP));
    /// 4-bit integers, symmetric, groups of 32.
    INT4_STATIC_32 = "kInt4Static32": QuantKey::sym(U4, st(Half, GroupShape::block(1, 32)));
    /// 4-bit integers with zero points.
    INT4_STATIC_ASYM = "kInt4StaticAsym": QuantKey { symmetric: false, ..QuantKey::sym(U4, st(Half, ANY_GROUP)) };
    /// 4-bit integers with zero points, groups of 32.
    INT4_STATIC_32_ASYM = "kInt4Static32Asym": QuantKey { symmetric: false, ..QuantKey::sym(U4, st(Half, GroupShape::block(1, 32))) };
    /// 8-bit integers stored with offset 128, group size chosen by the checkpoint.
    INT8_STATIC = "kInt8Static": QuantKey::sym(U8, st(Half, ANY_GROUP));
    /// 8-bit integers with zero points.
    INT8_STATIC_ASYM = "QuantKey(uint8,scale(f16,static,per_token),asymmetric)": QuantKey { symmetric: false, ..QuantKey::sym(U8, st(Half, ANY_GROUP)) };
}

impl QuantKey {
    /// A key by its name here (`FP8_STATIC_TENSOR_SYM`) or in vLLM (`kFp8StaticTensorSym`).
    pub fn by_name(name: &str) -> Option<QuantKey> {
        NAMED_KEYS.iter().find(|(ours, vllm, _)| *ours == name || *vllm == name).map(|k| k.2)
    }

    /// The key's constant name, or `unnamed key`.
    pub fn name(self) -> &'static str {
        NAMED_KEYS.iter().find(|k| k.2 == self).map_or("unnamed key", |k| k.0)
    }
}

impl std::fmt::Display for QuantKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_survives_its_bits_and_no_two_share_them() {
        for (i, (name, _, key)) in NAMED_KEYS.iter().enumerate() {
            assert_eq!(QuantKey::from_bits(key.bits()), Some(*key), "{name}");
            for (other, _, k) in &NAMED_KEYS[..i] {
                assert_ne!(k.bits(), key.bits(), "{name} and {other}");
            }
        }
    }

    #[test]
    fn integers_that_are_no_key_are_refused() {
        for bits in [0, 1, 0xff, FP8_STATIC_TENSOR_SYM.bits() | 1 << 12, FP8_STATIC_TENSOR_SYM.bits() ^ 3 << 56] {
            assert_eq!(QuantKey::from_bits(bits), None, "{bits:#x}");
        }
    }
}
