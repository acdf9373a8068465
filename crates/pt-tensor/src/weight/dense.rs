//! Weights held as they are computed with.

use super::Weight;
use crate::Result;
use tch::{Device, Kind, Tensor};

/// A weight held as a plain tensor.
#[derive(Debug)]
pub struct DenseWeight(Tensor);

impl DenseWeight {
    /// Holds `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`crate::TensorError::Shape`] unless the tensor has two axes.
    pub fn new(weight: Tensor) -> Result<Self> {
        if weight.dim() != 2 {
            return Err(crate::TensorError::shape("weight", &weight, "[out_features, in_features]"));
        }
        Ok(Self(weight))
    }
}

impl Weight for DenseWeight {
    fn size(&self) -> (i64, i64) {
        let size = self.0.size();
        (size[0], size[1])
    }

    fn dense(&self) -> Result<Tensor> {
        Ok(self.0.shallow_clone())
    }

    fn project(&self, hidden_states: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        crate::linear(hidden_states, &self.0, bias)
    }

    fn device(&self) -> Device {
        self.0.device()
    }

    fn kind(&self) -> Kind {
        self.0.kind()
    }

    fn parameter(&self) -> Option<&Tensor> {
        Some(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dense_weight_projects_as_its_matrix() {
        let weight = DenseWeight::new(Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.]).view([2, 3])).unwrap();
        let x = Tensor::from_slice(&[1f32, 0., -1.]).view([1, 3]);
        let y = weight.project(&x, Some(&Tensor::from_slice(&[10f32, 20.]))).unwrap();
        assert_eq!(Vec::<f32>::try_from(y.view([2])).unwrap(), [8., 18.]);
        assert_eq!(weight.size(), (2, 3));
        assert!(weight.project(&Tensor::ones([1, 4], (Kind::Float, Device::Cpu)), None).is_err());
    }
}
