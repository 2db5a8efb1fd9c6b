package main

func serveBare() {}
