//! What a run takes in memory before its activations, by part.

use pt_model::WeightMemory;
use pt_tensor::{AdamWVariant, Device, Tensor};
use std::fmt::Write;

/// The parts that are known before the first step.
pub(crate) struct Memory {
    pub(crate) weights: WeightMemory,
    /// Trained tensors; those of full fine-tuning are among the weights.
    pub(crate) trained: Vec<Tensor>,
    pub(crate) is_adapter: bool,
    pub(crate) variant: AdamWVariant,
    pub(crate) device: Device,
}

impl Memory {
    /// A line for each part.
    pub(crate) fn to_text(&self) -> String {
        let trained: usize = self.trained.iter().map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum();
        let numels = self.trained.iter().map(Tensor::numel);
        let mut text = String::from("memory by part, before activations:");
        let mut line = |part: &str, bytes: usize, note: &str| {
            // Writing to a string does not fail.
            let _ = write!(text, "\n  {part:<18} {:>9.1} MB  {note}", bytes as f64 / 1e6);
        };
        line_of_weights(&mut line, &self.weights);
        if self.is_adapter {
            line("adapter", trained, "");
        }
        line("gradients", trained, "");
        let place = match (self.variant.is_paged(), self.device) {
            (false, _) => "in memory",
            (true, Device::Cpu) => "in a file in the run's folder that the system pages",
            (true, _) => "in pinned memory of the host",
        };
        let state = self.variant.num_state_bytes(numels);
        line("optimizer state", state, &format!("{}, {place}", self.variant.name()));
        text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
    }
}

/// The lines of a model's weights.
pub(crate) fn line_of_weights(line: &mut dyn FnMut(&str, usize, &str), weights: &WeightMemory) {
    let WeightMemory { num_quantized, quantized_bytes, dense_bytes } = *weights;
    if num_quantized > 0 {
        let each = quantized_bytes as f64 / num_quantized as f64;
        let note = format!("{:.1} M weights of {each:.3} bytes", num_quantized as f64 / 1e6);
        line("4-bit weights", quantized_bytes, &note);
        line("dense weights", dense_bytes, "embeddings, norms, biases and what else is not in 4 bits");
    } else {
        line("weights", dense_bytes, "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pt_tensor::Kind;

    #[test]
    fn each_part_has_its_line() {
        let weights = WeightMemory { num_quantized: 2_000_000, quantized_bytes: 1_032_000, dense_bytes: 500_000 };
        let trained = vec![Tensor::zeros([50_000], (Kind::Float, Device::Cpu))];
        let memory =
            Memory { weights, trained, is_adapter: true, variant: AdamWVariant::PagedAdamw8bit, device: Device::Cpu };
        let text = memory.to_text();
        for part in [
            "4-bit weights            1.0 MB  2.0 M weights of 0.516 bytes",
            "adapter                  0.2 MB\n",
            "gradients                0.2 MB\n",
            "optimizer state          0.1 MB  paged_adamw_8bit, in a file",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
