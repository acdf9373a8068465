//! Keys and values of the tokens so far, in buffers that are made once and never grow.

use crate::ModelError;
use crate::Result;
use crate::decoder::{Attend, CausalLm, behind};
use crate::sites::{Past, TokenOrder, Tokens, VirtualTokens};
use pt_tensor::{AttentionPlan, CacheSlot, Segment, Tensor, decode_attention, packed_attention};
use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// Per layer `[rows, capacity, num_kv_heads, head_dim]` keys and values; a row begins with the virtual tokens.
#[derive(Debug)]
pub(super) struct Cache {
    layers: Vec<(Tensor, Tensor)>,
    scale: f64,
    window: Option<i64>,
    /// For methods that look back: what each layer read last, row by row, by the layer and the reach.
    recent: RefCell<BTreeMap<(usize, usize), Vec<Recent>>>,
}

/// The last tokens of a row that one layer read, and how many there have been.
#[derive(Debug)]
struct Recent {
    /// `[at most the reach, hidden_size]`
    inputs: Tensor,
    num_tokens: i64,
}

impl Cache {
    pub(super) fn new(model: &CausalLm, rows: usize, capacity: usize) -> Self {
        let config = model.config();
        let size = [rows as i64, capacity as i64, config.num_kv_heads, config.head_dim];
        let buffer = || Tensor::empty(size, (model.kind(), model.device()));
        let layers = (0..config.num_layers).map(|_| (buffer(), buffer())).collect();
        Self { layers, scale: model.attention_scale(), window: config.sliding_window, recent: RefCell::default() }
    }
}

/// Prompts, packed, each written to the rows of its samples.
#[derive(Debug)]
pub(super) struct Prefill {
    cache: Rc<Cache>,
    plan: Arc<AttentionPlan>,
    num_samples: i64,
    order: OnceCell<Rc<TokenOrder>>,
}

impl Prefill {
    pub(super) fn new(
        cache: Rc<Cache>,
        lengths: &[i64],
        num_samples: i64,
        num_virtual: usize,
        virtual_tokens: Option<&VirtualTokens>,
    ) -> Self {
        let mut start = 0;
        let segments = lengths
            .iter()
            .map(|len| {
                start += len;
                Segment { prefix: start - len..start - len, tokens: start - len..start }
            })
            .collect();
        let plan = behind(&Arc::new(AttentionPlan::new(segments)), num_virtual, virtual_tokens);
        Self { cache, plan, num_samples, order: OnceCell::new() }
    }
}

impl Prefill {
    /// The prompts' own tokens.
    fn prompts(&self) -> impl Iterator<Item = &Segment> {
        let common = self.plan.common;
        self.plan.segments.iter().filter(move |segment| segment.tokens.start >= common)
    }
}

impl Tokens for Prefill {
    fn past(&self, layer: usize, input: &Tensor, reach: usize) -> Result<Past> {
        let mut recent = Vec::new();
        for segment in self.prompts() {
            let (end, num_tokens) = (segment.tokens.end - self.plan.ahead(), segment.tokens.end - segment.tokens.start);
            let kept = num_tokens.min(reach as i64);
            // Copies: a view would hold the whole prompt's states.
            let inputs = input.f_narrow(0, end - kept, kept)?.copy();
            let sample = || Recent { inputs: inputs.shallow_clone(), num_tokens };
            recent.extend((0..self.num_samples).map(|_| sample()));
        }
        self.cache.recent.borrow_mut().insert((layer, reach), recent);
        let order = self.order.get_or_init(|| Rc::new(TokenOrder::of(&self.plan))).clone();
        Ok(Past { rows: input.shallow_clone(), order })
    }
}

impl Attend for Prefill {
    fn attend(&self, layer: usize, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let (keys, values) = &self.cache.layers[layer];
        let common = self.plan.common;
        let prompts = self.plan.segments.iter().filter(|segment| segment.tokens.start >= common);
        for (buffer, new) in [(keys, key), (values, value)] {
            // [rows, common, kv_heads, head_dim] ← [common, kv_heads, head_dim]
            let mut rows = buffer.narrow(1, 0, common);
            rows.f_copy_(&new.narrow(0, 0, common).unsqueeze(0).expand_as(&rows))?;
        }
        for (prompt, segment) in prompts.enumerate() {
            let (start, len) = (segment.tokens.start, segment.tokens.end - segment.tokens.start);
            for (buffer, new) in [(keys, key), (values, value)] {
                // [samples, len, kv_heads, head_dim] ← [len, kv_heads, head_dim]
                let own = buffer.narrow(0, prompt as i64 * self.num_samples, self.num_samples);
                let mut rows = own.narrow(1, common, len);
                rows.f_copy_(&new.narrow(0, start, len).unsqueeze(0).expand_as(&rows))?;
            }
        }
        Ok(packed_attention(query, key, value, &self.plan, self.cache.scale, self.cache.window)?)
    }
}

/// One new token per active row.
#[derive(Debug)]
pub(super) struct Decode {
    cache: Rc<Cache>,
    slots: Vec<CacheSlot>,
    /// What was looked back to, by the layer and the reach: each token goes into the cache once.
    pasts: RefCell<BTreeMap<(usize, usize), Past>>,
}

impl Decode {
    pub(super) fn new(cache: Rc<Cache>, slots: Vec<CacheSlot>) -> Self {
        Self { cache, slots, pasts: RefCell::default() }
    }
}

impl Tokens for Decode {
    fn past(&self, layer: usize, input: &Tensor, reach: usize) -> Result<Past> {
        let mut pasts = self.pasts.borrow_mut();
        if let Some(past) = pasts.get(&(layer, reach)) {
            return Ok(past.shared());
        }
        let mut recent = self.cache.recent.borrow_mut();
        let recent = recent.entry((layer, reach)).or_default();
        let mut parts = Vec::new();
        let (mut order, mut own, mut num_rows) = (TokenOrder::default(), vec![], 0);
        for (token, slot) in self.slots.iter().enumerate() {
            let row = recent.get_mut(slot.row as usize).ok_or_else(|| ModelError::Argument {
                what: "row of the cache".into(),
                found: slot.row.to_string(),
                expected: "one that a prompt was read into".into(),
            })?;
            let inputs = Tensor::f_cat(&[&row.inputs, &input.f_narrow(0, token as i64, 1)?], 0)?;
            let len = inputs.size()[0];
            row.num_tokens += 1;
            row.inputs = inputs.f_narrow(0, (len - reach as i64).max(0), len.min(reach as i64))?;
            for offset in 0..len as usize {
                order.previous.push((offset > 0).then(|| num_rows + offset - 1));
                order.positions.push(row.num_tokens - len + offset as i64);
            }
            num_rows += len as usize;
            own.push(num_rows - 1);
            parts.push(inputs);
        }
        order.own = Some(own);
        // One value for all layers of the pass, so that what is worked out from it is worked out once.
        let known = pasts.iter().find(|((_, other), _)| *other == reach).map(|(_, past)| past.order.clone());
        let past = Past { rows: Tensor::f_cat(&parts, 0)?, order: known.unwrap_or_else(|| Rc::new(order)) };
        pasts.insert((layer, reach), past.shared());
        Ok(past)
    }
}

impl Attend for Decode {
    fn attend(&self, layer: usize, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let (keys, values) = &self.cache.layers[layer];
        let Cache { scale, window, .. } = *self.cache;
        Ok(decode_attention((query, key, value), (keys, values), &self.slots, scale, window)?)
    }
}
