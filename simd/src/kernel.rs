//! The micro-kernel: one panel times the rows of some tokens, and its entry points per instruction set. (4-bit weights
//! have one of their own, in `nibble`, int8 activations in `dot`.)
//!
//! Lanes are rows of the panel and K runs sequentially, so that each output is two chains of multiply-adds (even and odd
//! columns) in an order that depends on nothing but the matrix: any tile of tokens gives the same bits.

use crate::Activation;
use crate::CpuIsa;
use crate::format::{self, Bytes, Code, Form, Format, GroupScale, Nibbles, PANEL, STEP_BYTES, Shape};
use crate::isa::{Isa, portable::Portable};
use crate::{Rounding, dot, fixed, int8, math, nibble, scaled};

/// Tokens that a caller hands over at once.
pub const CHUNK: usize = 12;

/// How far ahead of the running step memory is asked for, for several tokens.
pub(crate) const PREFETCH: usize = 8192;

/// The same for a lone token whose weights take many instructions to decode: the processor does not look far enough past
/// them.
pub(crate) const FAR: usize = 6144;

/// The same where they take few. It looks far enough by itself; but then its own prefetcher, which sees lines in the order
/// in which they are used, keeps ahead of it.
pub(crate) const NEAR: usize = 256;

/// Panels times `x[0 .. tokens]`.
pub struct Job<'a> {
    /// The matrix.
    pub shape: &'a Shape,
    /// `shape.panel_bytes()` bytes, or of each of several panels. (What the micro-kernels see is one panel.)
    pub panel: &'a [u8],
    /// Rows of `shape.cols` elements, or the forms of them that the code asks for.
    pub x: &'a [*const f32],
    /// Results of each panel, one per element of `x`.
    pub out: &'a mut [[f32; PANEL]],
}

impl Job<'_> {
    /// How many panels there are.
    #[inline(always)]
    fn panels(&self) -> usize {
        // No division for one, which is what there mostly is.
        if self.out.len() == self.x.len() { 1 } else { self.out.len() / self.x.len() }
    }

    /// The part of one of `panels`.
    #[inline(always)]
    fn one(&mut self, panels: usize, i: usize) -> Job<'_> {
        let bytes = if panels == 1 { self.panel.len() } else { self.panel.len() / panels };
        let tokens = self.x.len();
        let panel = &self.panel[i * bytes..][..bytes];
        Job { shape: self.shape, panel, x: self.x, out: &mut self.out[i * tokens..][..tokens] }
    }
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

/// # Safety
///
/// The processor has the function's instruction set.
pub type ActivateFn = unsafe fn(Activation, &[f32; PANEL], &[f32; PANEL], &mut [f32; PANEL]);

/// # Safety
///
/// As for [`PanelFn`]; tokens `t .. t + M` exist and `row + V * LANES <= 32`.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn tile<I: Isa, F: Format, const M: usize, const V: usize>(job: &mut Job<'_>, t: usize, row: usize) {
    let shape = job.shape;
    let zero = I::splat(0.0);
    let mut x = [std::ptr::null::<f32>(); M];
    x.copy_from_slice(&job.x[t..t + M]);
    let mut heads = [1f32; M];
    if F::SCALED {
        for m in 0..M {
            heads[m] = x[m].read();
            x[m] = x[m].add(scaled::HEAD);
        }
    }
    let base = job.panel.as_ptr();
    let mut p = base.add(shape.head());
    let (cols, group, scale) = (shape.cols, shape.group, shape.scale);
    // Results of single groups are added up in memory: the registers are the group's.
    let mut acc = [[zero; V]; M];
    let mut k = 0;
    while k < cols {
        let len = group.min(cols - k);
        let scales = p;
        p = p.add(scale.bytes());
        let mut zeros = [zero; V];
        if F::ZERO {
            for v in 0..V {
                zeros[v] = I::u8(p.add(row + v * I::LANES));
            }
            p = p.add(PANEL);
        }
        let mut sums = [[[zero; V]; M]; 2];
        for _ in 0..len / F::STEP {
            if t == 0 {
                let ahead = p.wrapping_add(if M > 1 { PREFETCH } else { F::AHEAD });
                I::prefetch(ahead);
                I::prefetch(ahead.wrapping_add(64));
            }
            step::<I, F, M, V>(p, row, &zeros, &x, &mut sums);
            p = p.add(STEP_BYTES);
            for m in 0..M {
                x[m] = x[m].add(F::STEP);
            }
            k += F::STEP;
        }
        let rest = len % F::STEP;
        if rest > 0 {
            // The step's other columns meet zeros: they are neither this group's nor, at the end, there at all.
            let mut tail = [[0f32; 4]; M];
            let mut tail_x = [std::ptr::null::<f32>(); M];
            for m in 0..M {
                for i in 0..rest {
                    tail[m][i] = x[m].add(i).read();
                }
                tail_x[m] = tail[m].as_ptr();
                x[m] = x[m].add(rest);
            }
            step::<I, F, M, V>(p, row, &zeros, &tail_x, &mut sums);
            p = p.add(STEP_BYTES);
            k += rest;
        }
        for v in 0..V {
            let s = if scale == GroupScale::None { I::splat(1.0) } else { scale.load::<I>(scales, row + v * I::LANES) };
            for m in 0..M {
                acc[m][v] = I::fma(I::add(sums[0][m][v], sums[1][m][v]), s, acc[m][v]);
            }
        }
    }
    for v in 0..V {
        let at = row + v * I::LANES;
        let factor = I::load(base.cast::<f32>().add(at));
        for m in 0..M {
            let y = if F::SCALED { I::mul(acc[m][v], I::splat(heads[m])) } else { acc[m][v] };
            let mut y = I::mul(y, factor);
            if shape.bias {
                y = I::add(y, I::load(base.cast::<f32>().add(PANEL + at)));
            }
            I::store(job.out[t + m].as_mut_ptr().add(at), y);
        }
    }
}

/// Adds a step to the sums: with sixteen lanes those over even and those over odd columns, for two chains of dependent
/// operations hide more latency than one; with fewer lanes, whose vectors are more and registers fewer, to the first.
/// Each output sees the same operations in the same order whatever M and V are.
///
/// # Safety
///
/// As for [`tile`]; `p` is a step and each of `x` can be read for `STEP` elements.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn, clippy::needless_range_loop)]
unsafe fn step<I: Isa, F: Format, const M: usize, const V: usize>(
    p: *const u8,
    row: usize,
    zeros: &[I::V; V],
    x: &[*const f32; M],
    sums: &mut [[[I::V; V]; M]; 2],
) {
    let chain = |k: usize| if I::LANES == 16 { k % 2 } else { 0 };
    let mut w = [[zeros[0]; 4]; V];
    for v in 0..V {
        F::decode::<I>(p, row + v * I::LANES, &mut w[v]);
        if F::ZERO {
            for k in 0..F::STEP {
                w[v][k] = I::sub(w[v][k], zeros[v]);
            }
        }
        // A single token uses each value once, right here, before it could leave its register.
        if M == 1 {
            for k in 0..F::STEP {
                let c = chain(k);
                sums[c][0][v] = I::fma(w[v][k], I::splat(x[0].add(k).read()), sums[c][0][v]);
            }
        }
    }
    if M == 1 {
        return;
    }
    for k in 0..F::STEP {
        for m in 0..M {
            let x = I::splat(x[m].add(k).read());
            for v in 0..V {
                sums[chain(k)][m][v] = I::fma(w[v][k], x, sums[chain(k)][m][v]);
            }
        }
    }
}

/// # Safety
///
/// As for [`PanelFn`].
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)]
unsafe fn panel<I: Isa, F: Format>(job: &mut Job<'_>) {
    let tokens = job.x.len();
    let mut t = 0;
    if I::LANES == 16 {
        // Up to 24 sums in 32 registers.
        while t < tokens {
            // Tiles of nearly the same size: few tokens for a weight leave the arithmetic idle while it is decoded.
            let m = (tokens - t).div_ceil((tokens - t).div_ceil(6));
            match m {
                1 => tile::<I, F, 1, 2>(job, t, 0),
                2 => tile::<I, F, 2, 2>(job, t, 0),
                3 => tile::<I, F, 3, 2>(job, t, 0),
                4 => tile::<I, F, 4, 2>(job, t, 0),
                5 => tile::<I, F, 5, 2>(job, t, 0),
                _ => tile::<I, F, 6, 2>(job, t, 0),
            }
            t += m;
        }
        return;
    }
    while t < tokens {
        let m = (tokens - t).min(4);
        if m == 1 {
            // All rows at once: the panel is read in one go.
            tile::<I, F, 1, 4>(job, t, 0);
        }
        let mut row = 0;
        while m > 1 && row < PANEL {
            match m {
                2 => tile::<I, F, 2, 2>(job, t, row),
                3 => tile::<I, F, 3, 2>(job, t, row),
                _ => tile::<I, F, 4, 2>(job, t, row),
            }
            row += 2 * I::LANES;
        }
        t += m;
    }
}

macro_rules! entries {
    ($module:ident, $isa:ty $(, $feature:literal)?) => {
        mod $module {
            use super::*;

            $(#[target_feature(enable = $feature)])?
            #[allow(unsafe_op_in_unsafe_fn)]
            unsafe fn entry<F: Format>(job: &mut Job<'_>) {
                let _subnormals = F::SCALED.then(scaled::Subnormals::on);
                let panels = job.panels();
                for i in 0..panels {
                    panel::<$isa, F>(&mut job.one(panels, i))
                }
            }

            $(#[target_feature(enable = $feature)])?
            #[allow(unsafe_op_in_unsafe_fn)]
            unsafe fn nibbles<F: Nibbles>(job: &mut Job<'_>) {
                let panels = job.panels();
                for i in 0..panels {
                    nibble::panel::<$isa, F>(&mut job.one(panels, i))
                }
            }

            $(#[target_feature(enable = $feature)])?
            #[allow(unsafe_op_in_unsafe_fn)]
            unsafe fn dots<F: Bytes>(job: &mut Job<'_>) {
                let panels = job.panels();
                for i in 0..panels {
                    dot::panel::<$isa, F, 1>(&mut job.one(panels, i))
                }
            }

            $(#[target_feature(enable = $feature)])?
            #[allow(unsafe_op_in_unsafe_fn)]
            unsafe fn parts<F: Bytes>(job: &mut Job<'_>) {
                let panels = job.panels();
                for i in 0..panels {
                    dot::panel::<$isa, F, { fixed::PARTS }>(&mut job.one(panels, i))
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
            pub(super) unsafe fn activate(
                a: Activation,
                gate: &[f32; PANEL],
                up: &[f32; PANEL],
                out: &mut [f32; PANEL],
            ) {
                math::activate(a, gate, up, out)
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn fix(x: &[f32], order: Option<&[u32]>, shape: &Shape, out: &mut [f32]) {
                fixed::row::<false>(x, order, shape.group, out)
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn fix_wide(x: &[f32], order: Option<&[u32]>, shape: &Shape, out: &mut [f32]) {
                fixed::row::<true>(x, order, shape.group, out)
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

/// Shapes with `pairs`; the others are the business of the set below.
#[cfg(target_arch = "x86_64")]
mod on_avx512_bf16 {
    use super::on_avx512_vnni as below;
    use super::*;
    use crate::pair_format::Pairs;
    use crate::{pair_dot, pairs};

    type Avx512 = crate::isa::avx512::Avx512<true>;

    #[target_feature(enable = "avx512bf16,avx512vbmi,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    #[allow(unsafe_op_in_unsafe_fn)]
    unsafe fn dots<F: Pairs>(job: &mut Job<'_>) {
        let (panels, plain) = (job.panels(), below::kernel(job.shape));
        for i in 0..panels {
            pair_dot::panel::<Avx512, F>(&mut job.one(panels, i), plain)
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

    pub(super) fn kernel(shape: &Shape) -> PanelFn {
        match shape.code {
            Code::Bf16 if shape.pairs => dots::<format::Bf16>,
            Code::E4m3 if shape.pairs => dots::<format::E4m3>,
            Code::E2m1 if shape.pairs => dots::<format::E2m1>,
            Code::U4 if shape.pairs => dots::<format::U4>,
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
