//! Entry points per instruction set of the micro-kernels, which multiply a panel with the rows of some tokens: `float`, `nibble`
//! for 4-bit weights, `dot` for int8 activations, `pair_dot` for bfloat16.

use crate::Activation;
use crate::CpuIsa;
use crate::format::{self, Bytes, Code, Form, Format, Nibbles, PANEL, Shape};
use crate::isa::Isa;
use crate::isa::portable::Portable;
use crate::{Rounding, dot, fixed, float, int8, math, nibble, scaled};

/// Tokens that a caller hands over at once.
pub const CHUNK: usize = 12;

/// How far ahead of the running step memory is asked for, for several tokens and for a lone one whose weights take many
/// instructions to decode: the processor does not look far enough past them. Not two pages, 8192, where lines lie in the sets of
/// the first-level cache that are in use.
pub(crate) const PREFETCH: usize = 7680;

/// The same for a lone token whose weights take few: the next line. The processor looks far enough by itself; but then its own
/// prefetcher, which sees lines in the order in which they are used, keeps ahead of it. Four lines ahead are too far for int8.
pub(crate) const NEAR: usize = 64;

/// Panels times `x[0 .. tokens]`.
pub struct Job<'a> {
    /// The matrix.
    pub(crate) shape: &'a Shape,
    /// See [`Job::new`].
    pub(crate) panel: &'a [u8],
    /// How many panels there are.
    pub(crate) panels: usize,
    /// Rows of `shape.cols` elements, or the forms of them that the code asks for.
    pub(crate) x: &'a [*const f32],
    /// Results of each panel, `each` rows apart, one per element of `x`.
    pub(crate) out: &'a mut [[f32; PANEL]],
    /// At least as many as `x` has elements.
    pub(crate) each: usize,
}

impl<'a> Job<'a> {
    /// Of one or several panels: `shape.panel_bytes()` bytes each, two and two as [`Shape::slabs`] says, with one result per
    /// element of `x` for each of them.
    pub fn new(shape: &'a Shape, panel: &'a [u8], x: &'a [*const f32], out: &'a mut [[f32; PANEL]]) -> Self {
        // No division for one, which is what there mostly is where tokens are many.
        let panels = if out.len() == x.len() { 1 } else { out.len() / x.len().max(1) };
        Self { shape, panel, panels, x, out, each: x.len() }
    }

    /// How many panels a kernel takes at once: where one tile reads them once, for one or two tokens, all, for between two loops the
    /// processor runs out of loads that are under way; otherwise two, which stay in the cache from tile to tile.
    #[inline(always)]
    fn at_once<I: Isa>(&self) -> usize {
        let one_tile = self.x.len() <= if I::LANES == 16 { 2 } else { 1 };
        if one_tile { self.panels.max(1) } else { 2 }
    }

    /// The part of up to `n` panels from `i` on.
    #[inline(always)]
    fn part(&mut self, i: usize, n: usize) -> Job<'_> {
        let panels = n.min(self.panels - i);
        let bytes = self.panel.len() / self.panels;
        let panel = &self.panel[i * bytes..][..panels * bytes];
        Job { panel, panels, out: &mut self.out[i * self.each..], ..*self }
    }

    /// The part of these tokens, which read `x`.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn tokens<'b>(&'b mut self, start: usize, x: &'b [*const f32]) -> Job<'b> {
        Job { x, out: &mut self.out[start..], ..*self }
    }
}

/// A panel's results of `LANES` rows from `at` on: sums times the factors at its start `base`, and biases, where it has some.
///
/// # Safety
///
/// As for [`Isa`]; `base` is a panel of the shape and `at + LANES <= 32`.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
pub(crate) unsafe fn finish<I: Isa>(shape: &Shape, base: *const u8, at: usize, sums: I::V, out: &mut [f32; PANEL]) {
    let base = base.cast::<f32>();
    let mut y = I::mul(sums, I::load(base.add(at)));
    if shape.bias {
        y = I::add(y, I::load(base.add(PANEL + at)));
    }
    I::store(out.as_mut_ptr().add(at), y);
}

/// # Safety
///
/// The processor has the kernel's instruction set, the panels were packed for the shape and have `panel_bytes` bytes
/// each, the kernel is the one for the shape, every pointer of `x`, of which there is one, can be read for `shape.cols`
/// elements (of a form: for `shape.form_len()`) and `out` is as long as `x` for every panel.
pub type PanelFn = unsafe fn(&mut Job<'_>);

/// [`fixed::row`], [`scaled::row`] or [`int8::row`] with what the instruction set offers.
///
/// # Safety
///
/// The processor has the function's instruction set.
pub type FormFn = unsafe fn(&[f32], Option<&[u32]>, &Shape, &mut [f32]);

/// Applies the activation to panels of `tokens` rows of gate, where it takes one, and as many of up, which become its results.
///
/// # Safety
///
/// The processor has the function's instruction set.
pub type ActivateFn = unsafe fn(Activation, usize, &mut [[f32; PANEL]]);

macro_rules! entries {
    ($module:ident, $isa:ty $(, $feature:literal)?) => {
        mod $module {
            use super::*;

            $(#[target_feature(enable = $feature)])?
            #[allow(unsafe_op_in_unsafe_fn)]
            unsafe fn entry<F: Format>(job: &mut Job<'_>) {
                let _subnormals = F::SCALED.then(scaled::Subnormals::on);
                let n = job.at_once::<$isa>();
                for i in (0..job.panels).step_by(n) {
                    float::panel::<$isa, F>(&mut job.part(i, n))
                }
            }

            $(#[target_feature(enable = $feature)])?
            #[allow(unsafe_op_in_unsafe_fn)]
            unsafe fn nibbles<F: Nibbles>(job: &mut Job<'_>) {
                let n = job.at_once::<$isa>();
                for i in (0..job.panels).step_by(n) {
                    nibble::panel::<$isa, F>(&mut job.part(i, n))
                }
            }

            $(#[target_feature(enable = $feature)])?
            #[allow(unsafe_op_in_unsafe_fn)]
            unsafe fn dots<F: Bytes>(job: &mut Job<'_>) {
                let n = job.at_once::<$isa>();
                for i in (0..job.panels).step_by(n) {
                    dot::panel::<$isa, F, 1>(&mut job.part(i, n))
                }
            }

            $(#[target_feature(enable = $feature)])?
            #[allow(unsafe_op_in_unsafe_fn)]
            unsafe fn parts<F: Bytes>(job: &mut Job<'_>) {
                let n = job.at_once::<$isa>();
                for i in (0..job.panels).step_by(n) {
                    dot::panel::<$isa, F, { fixed::PARTS }>(&mut job.part(i, n))
                }
            }

            pub(super) fn kernel(shape: &Shape) -> PanelFn {
                match shape.code {
                    Code::Int8Rows if shape.rounding == Rounding::None => parts::<format::Int8Rows>,
                    Code::Int8Rows => dots::<format::Int8Rows>,
                    Code::U8ZeroRows => dots::<format::U8ZeroRows>,
                    Code::E2m1 if shape.rounding != Rounding::None => dots::<format::E2m1>,
                    Code::U4 if shape.rounding != Rounding::None => dots::<format::U4>,
                    Code::U4Zero if shape.rounding != Rounding::None => dots::<format::U4Zero>,
                    Code::Bf16 => entry::<format::Bf16>,
                    Code::F16 => entry::<format::F16>,
                    Code::E4m3 => entry::<format::E4m3>,
                    Code::Int8 => entry::<format::Int8>,
                    Code::U8Zero => entry::<format::U8Zero>,
                    Code::E2m1 => nibbles::<format::E2m1>,
                    Code::U4 => nibbles::<format::U4>,
                    Code::U4Zero => nibbles::<format::U4Zero>,
                }
            }

            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn activate(a: Activation, tokens: usize, sums: &mut [[f32; PANEL]]) {
                let gates = if a.gated() { tokens } else { 0 };
                for sums in sums.chunks_exact_mut(gates + tokens) {
                    let (gate, up) = sums.split_at_mut(gates);
                    for (i, up) in up.iter_mut().enumerate() {
                        let x = *up;
                        math::activate(a, gate.get(i).unwrap_or(&x), &x, up);
                    }
                }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn fix(x: &[f32], order: Option<&[u32]>, shape: &Shape, out: &mut [f32]) {
                fixed::row::<false>(x, order, shape, out)
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn fix_wide(x: &[f32], order: Option<&[u32]>, shape: &Shape, out: &mut [f32]) {
                fixed::row::<true>(x, order, shape, out)
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn scale(x: &[f32], order: Option<&[u32]>, _: &Shape, out: &mut [f32]) {
                scaled::row(x, order, out)
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn round(x: &[f32], order: Option<&[u32]>, shape: &Shape, out: &mut [f32]) {
                int8::row::<$isa>(x, order, shape, out)
            }

            /// For the plain form and pairs some function, which is never called.
            pub(super) fn form(form: Form) -> FormFn {
                match form {
                    Form::Scaled | Form::Plain => scale,
                    Form::Fixed => fix,
                    Form::FixedWide => fix_wide,
                    Form::Int8 => round,
                    Form::Pairs => scale,
                }
            }
        }
    };
}

entries!(on_portable, Portable);
#[cfg(target_arch = "x86_64")]
entries!(on_avx2, crate::isa::avx2::Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
entries!(on_avx512, crate::isa::avx512::Avx512<false>, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
entries!(
    on_avx512_vnni,
    crate::isa::avx512::Avx512<true>,
    "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
);

/// Shapes with `pairs`, and e2m1, which VBMI decodes faster; the others are the business of the set below.
#[cfg(target_arch = "x86_64")]
mod on_avx512_bf16 {
    use super::on_avx512_vnni as below;
    use super::*;
    use crate::pair_format::Pairs;
    use crate::{pair_dot, pairs};

    type Avx512 = crate::isa::avx512::Avx512<true, true>;

    #[target_feature(enable = "avx512bf16,avx512vbmi,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe fn dots<F: Pairs>(job: &mut Job<'_>) {
        if pair_dot::lone::<Avx512, F>(job) {
            return;
        }
        let shape = Shape { pairs: false, ..*job.shape };
        let plain = kernel(&shape);
        let n = job.at_once::<Avx512>();
        for i in (0..job.panels).step_by(n) {
            pair_dot::panel::<Avx512, F>(&mut job.part(i, n), plain)
        }
    }

    #[target_feature(enable = "avx512bf16,avx512vbmi,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe fn pair<F: Pairs>(x: &[f32], order: Option<&[u32]>, shape: &Shape, out: &mut [f32]) {
        if pairs::row::<F>(x, order, shape.group, out) {
            return;
        }
        let out = &mut out[pairs::HEAD..];
        match (shape.plain_form(), order) {
            (Form::Plain, None) => out[..x.len()].copy_from_slice(x),
            (Form::Plain, Some(order)) => out.iter_mut().zip(order).for_each(|(to, c)| *to = x[*c as usize]),
            (form, _) => below::form(form)(x, order, shape, out),
        }
    }

    #[target_feature(enable = "avx512bf16,avx512vbmi,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe fn nibbles<F: Nibbles>(job: &mut Job<'_>) {
        let n = job.at_once::<Avx512>();
        for i in (0..job.panels).step_by(n) {
            nibble::panel::<Avx512, F>(&mut job.part(i, n))
        }
    }

    #[target_feature(enable = "avx512bf16,avx512vbmi,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe fn bytes<F: Bytes>(job: &mut Job<'_>) {
        let n = job.at_once::<Avx512>();
        for i in (0..job.panels).step_by(n) {
            dot::panel::<Avx512, F, 1>(&mut job.part(i, n))
        }
    }

    pub(super) fn kernel(shape: &Shape) -> PanelFn {
        match shape.code {
            Code::Bf16 if shape.pairs => dots::<format::Bf16>,
            Code::E4m3 if shape.pairs => dots::<format::E4m3>,
            Code::E2m1 if shape.pairs => dots::<format::E2m1>,
            Code::U4 if shape.pairs => dots::<format::U4>,
            Code::E2m1 if shape.rounding == Rounding::None => nibbles::<format::E2m1>,
            Code::E2m1 => bytes::<format::E2m1>,
            _ => below::kernel(shape),
        }
    }

    pub(super) fn form(shape: &Shape) -> FormFn {
        match shape.code {
            Code::Bf16 if shape.pairs => pair::<format::Bf16>,
            Code::E4m3 if shape.pairs => pair::<format::E4m3>,
            Code::E2m1 if shape.pairs => pair::<format::E2m1>,
            Code::U4 if shape.pairs => pair::<format::U4>,
            _ => below::form(shape.form()),
        }
    }
}

/// The kernel of a shape and an instruction set.
pub fn kernel(isa: CpuIsa, shape: &Shape) -> PanelFn {
    match isa {
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx2 => on_avx2::kernel(shape),
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx512 => on_avx512::kernel(shape),
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx512Vnni => on_avx512_vnni::kernel(shape),
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx512Bf16 => on_avx512_bf16::kernel(shape),
        _ => on_portable::kernel(shape),
    }
}

/// The activation of an instruction set.
pub fn activation(isa: CpuIsa) -> ActivateFn {
    match isa {
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx2 => on_avx2::activate,
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx512 => on_avx512::activate,
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx512Vnni | CpuIsa::Avx512Bf16 => on_avx512_vnni::activate,
        _ => on_portable::activate,
    }
}

/// How an instruction set brings rows into a form; for the plain form, never called.
pub fn form(isa: CpuIsa, shape: &Shape) -> FormFn {
    let form = shape.form();
    match isa {
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx2 => on_avx2::form(form),
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx512 => on_avx512::form(form),
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx512Vnni => on_avx512_vnni::form(form),
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx512Bf16 => on_avx512_bf16::form(shape),
        _ => on_portable::form(form),
    }
}
