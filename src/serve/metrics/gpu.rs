//! Metrics of the GPUs that the model runs on. Only a worker that uses CUDA has
//! them: zero bytes of a GPU that is not there would be an answer, and wrong.

use super::Metrics;
use super::registry::{LateMetric, Registry};
use crate::gpu::GpuUsage;

/// Definitions of these metrics.
pub(super) struct GpuMetrics {
    memory_used: LateMetric,
    memory_total: LateMetric,
    utilization: LateMetric,
}

impl GpuMetrics {
    pub(super) fn new(metrics: &mut Registry<'_>) -> Self {
        Self {
            memory_used: metrics.device_gauge(
                "imagegpt_gpu_memory_used_bytes",
                "Memory of the GPU that is in use, by whomever.",
            ),
            memory_total: metrics
                .device_gauge("imagegpt_gpu_memory_total_bytes", "Memory of the GPU."),
            utilization: metrics.device_gauge(
                "imagegpt_gpu_utilization_ratio",
                "Share of the last moments in which the GPU was computing.",
            ),
        }
    }
}

impl Metrics {
    /// Usage of the GPU that --device-id calls `id`, as it is now; what it does not
    /// tell has no series.
    pub fn gpu(&self, id: i32, usage: GpuUsage) {
        let (id, gpu) = (id.to_string(), &self.handles().gpu);
        let set = |metric: &LateMetric, value: Option<f64>| {
            if let Some(value) = value {
                metric.gauge(&self.0.recorder, &[&id]).set(value);
            }
        };
        let memory = usage.memory;
        set(
            &gpu.memory_used,
            memory.map(|memory| bytes(memory.used_bytes)),
        );
        set(
            &gpu.memory_total,
            memory.map(|memory| bytes(memory.total_bytes)),
        );
        set(&gpu.utilization, usage.utilization);
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "memory of a GPU stays far below 2^52 bytes"
)]
fn bytes(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::MemoryUse;

    #[test]
    fn series_appear_with_their_first_value() {
        let metrics = Metrics::new().unwrap();
        assert!(!metrics.render().contains("imagegpt_gpu"));
        let memory = Some(MemoryUse {
            used_bytes: 5,
            total_bytes: 80,
        });
        let whole = GpuUsage {
            memory,
            utilization: Some(0.5),
            power_watts: None,
        };
        metrics.gpu(0, whole);
        // A part of a GPU has no utilization.
        let part = GpuUsage {
            memory,
            ..GpuUsage::default()
        };
        metrics.gpu(3, part);
        let page = metrics.render();
        for line in [
            "imagegpt_gpu_memory_used_bytes{device=\"0\"} 5",
            "imagegpt_gpu_memory_total_bytes{device=\"3\"} 80",
            "imagegpt_gpu_utilization_ratio{device=\"0\"} 0.5",
        ] {
            assert!(page.lines().any(|seen| seen == line), "{line}: {page}");
        }
        assert!(!page.contains("imagegpt_gpu_utilization_ratio{device=\"3\"}"));
    }
}
