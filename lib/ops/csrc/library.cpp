// Schemas of the operators and their registration. Only torch/library.h: one build serves any Python.
#include <torch/library.h>

#include "anchor_windows_ops.h"
#include "conv_act.h"
#include "max_pool_ops.h"
#include "ops.h"

TORCH_LIBRARY(detectron, m) {
  m.def("nms(Tensor boxes, Tensor scores, float thresh, bool plus_one=True) -> Tensor");
  m.def(
      "batched_nms(Tensor boxes, Tensor valid, float thresh, int max_out, bool plus_one=True,"
      " Tensor? groups=None) -> (Tensor, Tensor)");
  m.def(
      "roi_align(Tensor[] features, Tensor rois, Tensor? levels, float[] scales, int pooled_h,"
      " int pooled_w, int sampling_ratio, bool aligned) -> Tensor");
  m.def(
      "roi_align_backward(Tensor grad, Tensor rois, Tensor? levels, float[] scales, SymInt[] sizes,"
      " int sampling_ratio, bool aligned, bool channels_last) -> Tensor[]");
  m.def(
      "roi_pool(Tensor[] features, Tensor rois, Tensor? levels, float[] scales, int pooled_h,"
      " int pooled_w) -> (Tensor, Tensor)");
  m.def(
      "roi_pool_backward(Tensor grad, Tensor argmax, Tensor rois, Tensor? levels, float[] scales,"
      " SymInt[] sizes, bool channels_last) -> Tensor[]");
  m.def(
      "roi_crop(Tensor[] features, Tensor rois, Tensor? levels, float[] scales, int pooled_h,"
      " int pooled_w, bool max_pool) -> (Tensor, Tensor)");
  m.def(
      "roi_crop_backward(Tensor grad, Tensor choice, Tensor rois, Tensor? levels, float[] scales,"
      " SymInt[] sizes, bool max_pool, bool channels_last) -> Tensor[]");
  m.def(
      "ps_roi_pool(Tensor[] features, Tensor rois, Tensor? levels, float[] scales, int grid_size)"
      " -> Tensor");
  m.def(
      "ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor? levels, float[] scales,"
      " SymInt[] sizes, bool channels_last) -> Tensor[]");
  m.def(
      "image_batch(Tensor pixels, Tensor meta, SymInt height, SymInt width, Tensor means) -> Tensor");
  m.def(
      "polygons_to_masks(Tensor coords, Tensor poly_offsets, Tensor object_offsets, Tensor rois,"
      " Tensor object_index, int resolution) -> Tensor");
  m.def(
      "batched_soft_nms(Tensor boxes, Tensor scores, Tensor valid, float sigma,"
      " float overlap_thresh, float score_thresh, int method) -> (Tensor, Tensor, Tensor)");
  m.def(
      "box_voting(Tensor top_dets, Tensor all_dets, Tensor top_group, Tensor offsets, float thresh,"
      " int method, float beta) -> Tensor");
  m.def(
      "paste_masks(Tensor masks, Tensor boxes, SymInt im_h, SymInt im_w, float thresh) -> Tensor");
  m.def(
      "encode_masks(Tensor masks, Tensor boxes, int im_h, int im_w, float thresh)"
      " -> (Tensor, Tensor)");
  m.def(
      "group_norm(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int groups, float eps,"
      " bool relu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean,"
      " Tensor rstd, Tensor? out, int groups, bool relu) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("bias_act_(Tensor(a!) y, Tensor? bias, Tensor? residual, bool relu) -> ()");
  m.def("relu_backward(Tensor grad, Tensor y, bool with_sum) -> (Tensor, Tensor)");
  m.def("channel_sum(Tensor map) -> Tensor");
  m.def("add_upsampled(Tensor lateral, Tensor top) -> Tensor");
  m.def("sum_2x2(Tensor map) -> Tensor");
  m.def(
      "match_anchors(Tensor anchors, Tensor gt_boxes, Tensor gt_valid, Tensor? im_info,"
      " float positive_overlap, float straddle_thresh) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sample_anchors(Tensor foreground, Tensor background, Tensor random, int max_foreground)"
      " -> (Tensor, Tensor)");
  m.def("anchor_windows(Tensor[] features, Tensor index, int num_anchors) -> Tensor");
  m.def(
      "anchor_windows_backward(Tensor grad, Tensor index, int num_anchors, SymInt[] sizes,"
      " bool channels_last) -> Tensor[]");
  m.def("max_pool(Tensor x) -> Tensor");
  m.def(
      "sigmoid_focal_loss(Tensor logits, Tensor labels, float alpha, float gamma, bool with_grad)"
      " -> (Tensor, Tensor)");
  m.def(
      "conv_act(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, bool relu,"
      " int[2] stride, int[2] padding, int[2] dilation, bool transposed, int groups) -> Tensor");
  m.def("upsample_add(Tensor lateral, Tensor top) -> Tensor");
}

TORCH_LIBRARY_IMPL(detectron, CompositeImplicitAutograd, m) {
  m.impl("conv_act", &detectron::conv_act);
  m.impl("upsample_add", &detectron::upsample_add);
}

TORCH_LIBRARY_IMPL(detectron, CPU, m) {
  m.impl("nms", &detectron::cpu::nms);
  m.impl("batched_nms", &detectron::cpu::batched_nms);
  m.impl("roi_align", &detectron::cpu::roi_align);
  m.impl("roi_align_backward", &detectron::cpu::roi_align_backward);
  m.impl("roi_pool", &detectron::cpu::roi_pool);
  m.impl("roi_pool_backward", &detectron::cpu::roi_pool_backward);
  m.impl("roi_crop", &detectron::cpu::roi_crop);
  m.impl("roi_crop_backward", &detectron::cpu::roi_crop_backward);
  m.impl("ps_roi_pool", &detectron::cpu::ps_roi_pool);
  m.impl("ps_roi_pool_backward", &detectron::cpu::ps_roi_pool_backward);
  m.impl("image_batch", &detectron::cpu::image_batch);
  m.impl("polygons_to_masks", &detectron::cpu::polygons_to_masks);
  m.impl("batched_soft_nms", &detectron::cpu::batched_soft_nms);
  m.impl("box_voting", &detectron::cpu::box_voting);
  m.impl("paste_masks", &detectron::cpu::paste_masks);
  m.impl("encode_masks", &detectron::cpu::encode_masks);
  m.impl("group_norm", &detectron::cpu::group_norm);
  m.impl("group_norm_backward", &detectron::cpu::group_norm_backward);
  m.impl("bias_act_", &detectron::cpu::bias_act_);
  m.impl("relu_backward", &detectron::cpu::relu_backward);
  m.impl("channel_sum", &detectron::cpu::channel_sum);
  m.impl("add_upsampled", &detectron::cpu::add_upsampled);
  m.impl("sum_2x2", &detectron::cpu::sum_2x2);
  m.impl("match_anchors", &detectron::cpu::match_anchors);
  m.impl("sample_anchors", &detectron::cpu::sample_anchors);
  m.impl("anchor_windows", &detectron::cpu::anchor_windows);
  m.impl("anchor_windows_backward", &detectron::cpu::anchor_windows_backward);
}

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(detectron, CUDA, m) {
  m.impl("nms", &detectron::cuda::nms);
  m.impl("batched_nms", &detectron::cuda::batched_nms);
  m.impl("roi_align", &detectron::cuda::roi_align);
  m.impl("roi_align_backward", &detectron::cuda::roi_align_backward);
  m.impl("roi_pool", &detectron::cuda::roi_pool);
  m.impl("roi_pool_backward", &detectron::cuda::roi_pool_backward);
  m.impl("roi_crop", &detectron::cuda::roi_crop);
  m.impl("roi_crop_backward", &detectron::cuda::roi_crop_backward);
  m.impl("ps_roi_pool", &detectron::cuda::ps_roi_pool);
  m.impl("ps_roi_pool_backward", &detectron::cuda::ps_roi_pool_backward);
  m.impl("image_batch", &detectron::cuda::image_batch);
  m.impl("polygons_to_masks", &detectron::cuda::polygons_to_masks);
  m.impl("batched_soft_nms", &detectron::cuda::batched_soft_nms);
  m.impl("box_voting", &detectron::cuda::box_voting);
  m.impl("paste_masks", &detectron::cuda::paste_masks);
  m.impl("encode_masks", &detectron::cuda::encode_masks);
  m.impl("group_norm", &detectron::cuda::group_norm);
  m.impl("group_norm_backward", &detectron::cuda::group_norm_backward);
  m.impl("bias_act_", &detectron::cuda::bias_act_);
  m.impl("relu_backward", &detectron::cuda::relu_backward);
  m.impl("channel_sum", &detectron::cuda::channel_sum);
  m.impl("add_upsampled", &detectron::cuda::add_upsampled);
  m.impl("sum_2x2", &detectron::cuda::sum_2x2);
  m.impl("sigmoid_focal_loss", &detectron::cuda::sigmoid_focal_loss);
  m.impl("max_pool", &detectron::cuda::max_pool);
  m.impl("match_anchors", &detectron::cuda::match_anchors);
  m.impl("sample_anchors", &detectron::cuda::sample_anchors);
  m.impl("anchor_windows", &detectron::cuda::anchor_windows);
  m.impl("anchor_windows_backward", &detectron::cuda::anchor_windows_backward);
}
#else
namespace {
void built_without_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(
      false, op.schema().name(),
      ": the operators were built without CUDA; install nvcc and run ./make.sh again"
      " (with FORCE_CUDA=1 where no GPU is visible while building)");
}
}  // namespace

TORCH_LIBRARY_IMPL(detectron, CUDA, m) {
  for (const char* name : {"nms", "batched_nms", "roi_align", "roi_align_backward", "roi_pool",
                           "roi_pool_backward", "roi_crop", "roi_crop_backward", "ps_roi_pool",
                           "ps_roi_pool_backward", "image_batch", "polygons_to_masks",
                           "batched_soft_nms", "box_voting", "paste_masks", "encode_masks",
                           "group_norm", "group_norm_backward",
                           "bias_act_", "relu_backward", "channel_sum", "add_upsampled",
                           "sum_2x2", "match_anchors", "sample_anchors", "anchor_windows",
                           "anchor_windows_backward", "max_pool", "sigmoid_focal_loss"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&built_without_cuda>());
  }
}
#endif
