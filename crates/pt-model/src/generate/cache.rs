//! Keys and values of the tokens so far, in buffers that are made once and never grow.

use crate::Result;
use crate::decoder::{Attend, CausalLm, behind};
use crate::sites::VirtualTokens;
use pt_tensor::{AttentionPlan, CacheSlot, Segment, Tensor, decode_attention, packed_attention};
use std::rc::Rc;
use std::sync::Arc;

/// Per layer `[rows, capacity, num_kv_heads, head_dim]` keys and values; a row begins with the virtual tokens.
#[derive(Debug)]
pub(super) struct Cache {
    layers: Vec<(Tensor, Tensor)>,
    scale: f64,
    window: Option<i64>,
}

impl Cache {
    pub(super) fn new(model: &CausalLm, rows: usize, capacity: usize) -> Self {
        let config = model.config();
        let size = [rows as i64, capacity as i64, config.num_kv_heads, config.head_dim];
        let buffer = || Tensor::empty(size, (model.kind(), model.device()));
        let layers = (0..config.num_layers).map(|_| (buffer(), buffer())).collect();
        Self { layers, scale: model.attention_scale(), window: config.sliding_window }
    }
}

/// Prompts, packed, each written to the rows of its samples.
#[derive(Debug)]
pub(super) struct Prefill {
    cache: Rc<Cache>,
    plan: Arc<AttentionPlan>,
    num_samples: i64,
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
        Self { cache, plan, num_samples }
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
}

impl Decode {
    pub(super) fn new(cache: Rc<Cache>, slots: Vec<CacheSlot>) -> Self {
        Self { cache, slots }
    }
}

impl Attend for Decode {
    fn attend(&self, layer: usize, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let (keys, values) = &self.cache.layers[layer];
        let Cache { scale, window, .. } = *self.cache;
        Ok(decode_attention((query, key, value), (keys, values), &self.slots, scale, window)?)
    }
}
