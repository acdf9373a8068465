//! Rotary position tables, made as positions come to be needed.

use crate::config::{ModelConfig, RopeScaling};
use pt_tensor::{Device, Kind, Tensor};

/// Cosines and sines by position, `[positions, head_dim / 2]` f32, grown in powers of two.
#[derive(Debug)]
pub(crate) struct Rope {
    inverse_frequencies: Tensor,
    table: (Tensor, Tensor),
    device: Device,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig, device: Device) -> Self {
        let half = config.head_dim / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| {
                let exponent = (2 * i) as f32 / config.head_dim as f32;
                let frequency = 1.0 / (config.rope_theta as f32).powf(exponent);
                match &config.rope_scaling {
                    RopeScaling::None => frequency,
                    RopeScaling::Linear { factor } => frequency / *factor as f32,
                    scaling @ RopeScaling::Llama3 { .. } => llama3(frequency, scaling),
                }
            })
            .collect();
        let inverse_frequencies = Tensor::from_slice(&frequencies);
        let empty = || Tensor::zeros([0, half], (Kind::Float, device));
        Self { inverse_frequencies, table: (empty(), empty()), device }
    }

    /// `(cos, sin)`, each `[tokens, head_dim / 2]`, of `positions: [tokens]`, all under `length`.
    pub(crate) fn at(&mut self, positions: &Tensor, length: i64) -> (Tensor, Tensor) {
        if self.table.0.size()[0] < length {
            let rows = (length as u64).next_power_of_two().max(256) as i64;
            let angles = Tensor::arange(rows, (Kind::Float, Device::Cpu)).outer(&self.inverse_frequencies);
            self.table = (angles.cos().to_device(self.device), angles.sin().to_device(self.device));
        }
        let (cos, sin) = &self.table;
        (cos.index_select(0, positions), sin.index_select(0, positions))
    }
}

/// Llama 3's stretched frequencies: long waves are slowed by `factor`, short ones kept, those between blended.
fn llama3(frequency: f32, scaling: &RopeScaling) -> f32 {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } = scaling
    else {
        return frequency;
    };
    let (factor, low, high) = (*factor as f32, *low_freq_factor as f32, *high_freq_factor as f32);
    let original = *original_max_position_embeddings as f32;
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength < original / high {
        frequency
    } else if wavelength > original / low {
        frequency / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}
