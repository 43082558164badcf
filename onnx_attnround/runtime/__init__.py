"""What computes: sessions of ONNX Runtime, and the device that torch works on."""
