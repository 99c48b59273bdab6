//! The forward calls.

use super::workspace::{Carver, Size};
use super::*;
use crate::cpu::{Assignment, Segment, padded};

/// Prepared rows of one chunk.
struct Parts<'a> {
    x: &'a mut [f32],
    y: &'a mut [f32],
    row: &'a mut [f32],
    scratch: &'a mut [f32],
    assignments: &'a mut [Assignment],
    segments: &'a mut [Segment],
    counts: &'a mut [u32],
    slots: &'a mut [u32],
}

/// Columns that are added up together.
const COLUMNS: usize = 32;

/// Marks a slot of a token whose expert is not here.
const ABSENT: u32 = u32::MAX;

impl<X: Experts> MoeKernel<Standard, X> {
    /// Input rows: one per token, or one per slot where the weight multiplies the input.
    fn input_rows(&self, tokens: usize) -> usize {
        if self.config.weight_on_input { tokens * self.config.topk } else { tokens }
    }

    fn size(&self, tokens: usize) -> Size {
        let (t, c) = (tokens.min(CHUNK), &self.config);
        let slots = t * c.topk;
        Size::default()
            .add::<f32>(self.input_rows(t) * padded(c.hidden))
            .add::<f32>(slots * c.hidden)
            .add::<f32>(padded(c.hidden))
            .add::<f32>(self.experts.scratch_len(slots))
            .add::<Assignment>(slots)
            .add::<Segment>(c.local_experts)
            .add::<u32>(c.local_experts)
            .add::<u32>(slots)
    }

    /// Bytes of workspace that [`forward`](Self::forward) needs for up to `tokens` tokens.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        self.size(tokens).bytes()
    }

    /// Bytes of workspace that [`forward_router`](Self::forward_router) needs for up to `tokens` tokens.
    pub fn router_workspace_bytes(&self, tokens: usize) -> usize {
        let slots = tokens * self.config.topk;
        let own = Size::default().add::<i32>(slots).add::<f32>(slots);
        own.add::<f32>(routing::scratch_len(self.config.experts)).bytes() + self.workspace_bytes(tokens)
    }

    /// The modular entry: hidden states `[T, H]` with `topk_ids` and `topk_weights` `[T, k]` (global ids, -1 for none)
    /// to `output` `[T, H]`. Allocates nothing. A token's result depends on nothing but the token.
    pub fn forward(
        &self,
        hidden: Rows<'_>,
        topk_ids: &[i32],
        topk_weights: &[f32],
        mut output: RowsMut<'_>,
        workspace: &mut [u8],
        pool: &dyn Executor,
    ) -> Result<(), ForwardError> {
        let c = &self.config;
        let tokens = check_routed(c, hidden.len(), topk_ids, topk_weights)?;
        expect("output", output.len(), hidden.len())?;
        let want = self.workspace_bytes(tokens);
        if workspace.len() < want {
            return Err(ForwardError::Workspace { have: workspace.len(), want });
        }
        for start in (0..tokens).step_by(CHUNK) {
            let t = (tokens - start).min(CHUNK);
            let slots = start * c.topk..(start + t) * c.topk;
            let mut carver = Carver::new(workspace);
            let mut parts = Parts {
                x: carver.take(self.input_rows(t) * padded(c.hidden)),
                y: carver.take(t * c.topk * c.hidden),
                row: carver.take(padded(c.hidden)),
                scratch: carver.take(self.experts.scratch_len(t * c.topk)),
                assignments: carver.take(t * c.topk),
                segments: carver.take(c.local_experts),
                counts: carver.take(c.local_experts),
                slots: carver.take(t * c.topk),
            };
            let weights = &topk_weights[slots.clone()];
            self.widen(&hidden, start, t, weights, &mut parts);
            let (assignments, segments) = self.group(&topk_ids[slots], &mut parts);
            let call = ExpertsCall {
                input: parts.x,
                input_stride: padded(c.hidden),
                assignments: &parts.assignments[..assignments],
                segments: &parts.segments[..segments],
            };
            self.experts.run(call, parts.scratch, parts.y, pool);
            self.combine(start, t, weights, &mut parts, &mut output);
        }
        Ok(())
    }

    fn widen(&self, hidden: &Rows<'_>, start: usize, tokens: usize, weights: &[f32], parts: &mut Parts<'_>) {
        let (h, stride, k) = (self.config.hidden, padded(self.config.hidden), self.config.topk);
        for t in 0..tokens {
            if !self.config.weight_on_input {
                hidden.widen(start + t, h, &mut parts.x[t * stride..][..stride]);
                continue;
            }
            let rows = parts.x[t * k * stride..].chunks_exact_mut(stride);
            for (x, w) in rows.zip(&weights[t * k..(t + 1) * k]) {
                hidden.widen(start + t, h, x);
                x.iter_mut().for_each(|v| *v *= w);
            }
        }
    }

    /// Counting sort of the slots by local expert; within an expert in order of tokens.
    fn group(&self, ids: &[i32], parts: &mut Parts<'_>) -> (usize, usize) {
        parts.counts.fill(0);
        for (slot, id) in parts.slots.iter_mut().zip(ids) {
            let local = match (&self.map, usize::try_from(*id)) {
                (_, Err(_)) => -1,
                (None, Ok(_)) => *id,
                (Some(map), Ok(id)) => map[id],
            };
            *slot = u32::try_from(local).unwrap_or(ABSENT);
            if *slot != ABSENT {
                parts.counts[*slot as usize] += 1;
            }
        }
        let (mut start, mut segments) = (0, 0);
        for (expert, count) in parts.counts.iter_mut().enumerate() {
            if *count > 0 {
                parts.segments[segments] = Segment { expert: expert as u32, start, len: *count };
                segments += 1;
            }
            // From here on: where the expert's next assignment goes.
            start += std::mem::replace(count, start);
        }
        for (i, slot) in parts.slots.iter().enumerate() {
            if *slot != ABSENT {
                let input_row = if self.config.weight_on_input { i } else { i / self.config.topk };
                let at = &mut parts.counts[*slot as usize];
                parts.assignments[*at as usize] = Assignment { input_row: input_row as u32, output_row: i as u32 };
                *at += 1;
            }
        }
        (start as usize, segments)
    }

    /// Sums each token's experts in the order of its slots.
    fn combine(&self, start: usize, tokens: usize, weights: &[f32], parts: &mut Parts<'_>, output: &mut RowsMut<'_>) {
        let (h, k) = (self.config.hidden, self.config.topk);
        let row = &mut parts.row[..h];
        for t in 0..tokens {
            let (slots, weights) = (&parts.slots[t * k..][..k], &weights[t * k..][..k]);
            let sum = |at: usize, sums: &mut [f32]| {
                sums.fill(0.0);
                for (i, weight) in weights.iter().enumerate().filter(|(i, _)| slots[*i] != ABSENT) {
                    let w = if self.config.weight_on_input { 1.0 } else { *weight };
                    let y = &parts.y[(t * k + i) * h + at..][..sums.len()];
                    sums.iter_mut().zip(y).for_each(|(sum, y)| *sum += w * y);
                }
            };
            // Few columns at a time, as many as stay in registers.
            let (some, rest) = row.as_chunks_mut::<COLUMNS>();
            for (i, row) in some.iter_mut().enumerate() {
                let mut sums = [0f32; COLUMNS];
                sum(i * COLUMNS, &mut sums);
                *row = sums;
            }
            sum(h - rest.len(), rest);
            output.narrow(start + t, row);
        }
    }

    /// The monolithic entry: routes `logits` `[T, E]` (with `bias` `[E]`, see [`routing::route_token`]) and runs.
    pub fn forward_router(
        &self,
        hidden: Rows<'_>,
        logits: &[f32],
        bias: Option<&[f32]>,
        output: RowsMut<'_>,
        workspace: &mut [u8],
        pool: &dyn Executor,
    ) -> Result<(), ForwardError> {
        let c = &self.config;
        if !c.routing.method.routes_inside() {
            return Err(ForwardError::Routing);
        }
        let tokens = hidden.len() / c.hidden;
        expect("router_logits", logits.len(), tokens * c.experts)?;
        expect("the score correction bias", bias.map_or(c.experts, <[f32]>::len), c.experts)?;
        let want = self.router_workspace_bytes(tokens);
        if workspace.len() < want {
            return Err(ForwardError::Workspace { have: workspace.len(), want });
        }
        let (own, rest) = workspace.split_at_mut(want - self.workspace_bytes(tokens));
        let mut carver = Carver::new(own);
        let (ids, weights) = (carver.take::<i32>(tokens * c.topk), carver.take::<f32>(tokens * c.topk));
        let scratch = carver.take::<f32>(routing::scratch_len(c.experts));
        for t in 0..tokens {
            let (logits, slots) = (&logits[t * c.experts..][..c.experts], t * c.topk..(t + 1) * c.topk);
            routing::route_token(&c.routing, logits, bias, scratch, &mut ids[slots.clone()], &mut weights[slots]);
        }
        self.forward(hidden, ids, weights, output, rest, pool)
    }
}

impl<X: Experts> MoeKernel<Batched, X> {
    fn size(&self, max_tokens: usize) -> Size {
        let c = &self.config;
        let rows = c.local_experts * max_tokens;
        Size::default()
            .add::<f32>(rows * padded(c.hidden))
            .add::<f32>(rows * c.hidden)
            .add::<f32>(self.experts.scratch_len(rows))
            .add::<Assignment>(rows)
            .add::<Segment>(c.local_experts)
    }

    /// Bytes of workspace for up to `max_tokens` slots per expert.
    pub fn workspace_bytes(&self, max_tokens: usize) -> usize {
        self.size(max_tokens).bytes()
    }

    /// `hidden` `[E, max_tokens, H]` of which the first `counts[e]` rows per local expert hold tokens, to `output` of
    /// the same shape: expert results without routing weights. Rows beyond the counts are neither read nor written.
    pub fn forward_batched(
        &self,
        hidden: Rows<'_>,
        counts: &[i32],
        mut output: RowsMut<'_>,
        workspace: &mut [u8],
        pool: &dyn Executor,
    ) -> Result<(), ForwardError> {
        let (h, e) = (self.config.hidden, self.config.local_experts);
        let max = hidden.len() / (e * h);
        expect("hidden_states", hidden.len(), e * max * h)?;
        expect("output", output.len(), hidden.len())?;
        expect("the token counts", counts.len(), e)?;
        if let Some(expert) = counts.iter().position(|n| usize::try_from(*n).map_or(true, |n| n > max)) {
            return Err(ForwardError::Count { expert, count: counts[expert], max });
        }
        let want = self.workspace_bytes(max);
        if workspace.len() < want {
            return Err(ForwardError::Workspace { have: workspace.len(), want });
        }
        let mut carver = Carver::new(workspace);
        let x = carver.take::<f32>(e * max * padded(h));
        let y = carver.take::<f32>(e * max * h);
        let scratch = carver.take::<f32>(self.experts.scratch_len(e * max));
        let assignments = carver.take::<Assignment>(e * max);
        let segments = carver.take::<Segment>(e);
        let (mut n, mut live) = (0, 0);
        for (expert, count) in counts.iter().enumerate().filter(|(_, n)| **n > 0) {
            segments[live] = Segment { expert: expert as u32, start: n as u32, len: *count as u32 };
            live += 1;
            for row in expert * max..expert * max + *count as usize {
                hidden.widen(row, h, &mut x[row * padded(h)..][..padded(h)]);
                assignments[n] = Assignment { input_row: row as u32, output_row: row as u32 };
                n += 1;
            }
        }
        let call = ExpertsCall {
            input: x,
            input_stride: padded(h),
            assignments: &assignments[..n],
            segments: &segments[..live],
        };
        self.experts.run(call, scratch, y, pool);
        for a in &assignments[..n] {
            let row = a.output_row as usize;
            output.narrow(row, &y[row * h..][..h]);
        }
        Ok(())
    }
}
